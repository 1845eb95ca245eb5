"""The settings of ``recipes.new_task``, and their defaults for each family of data sets."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.continual import learners
from recipes.continual.learners import Tuning


@dataclass(frozen=True, kw_only=True)
class NewTaskSettings(learners.Settings):
    """What may be tuned; every field is an option of the command line.

    Attributes:
        task1_epochs: Passes over task 1.
        epochs: Passes of the path over task 2.
        baseline_epochs: Passes of the other methods, which get as much time as the path or more.
        batch_size: Inputs of a training step.
        task1_lr: Adam's highest learning rate on task 1.
    """

    task1_epochs: int
    epochs: float
    baseline_epochs: float
    batch_size: int
    task1_lr: float = 3e-3

    def epochs_of(self, method: str) -> float:
        """Passes of a method over task 2."""
        return self.epochs if method == "fip" else self.baseline_epochs


# The defaults in which the families of data sets in recipes.common.data.DATASETS differ.
DEFAULTS = {
    "digits": NewTaskSettings(
        anchors=200,
        task1_epochs=20,
        epochs=20,
        baseline_epochs=200,
        batch_size=32,
        beta=10.0,
        eps=0.8,
        max_products=8,
        tuning={
            "naive": Tuning(3e-3),
            "distillation": Tuning(1e-2, 0.03),
            "distillation-muon": Tuning(1e-2, 0.03),
            "replay": Tuning(3e-3, 1.0),
            "ewc": Tuning(3e-3, 100.0),
            "gem": Tuning(3e-3, 0.5),
            "lwf": Tuning(3e-3, 1.0),
        },
    ),
    "mnist": NewTaskSettings(
        anchors=500,
        anchor_batch=25,
        augment=True,
        task1_epochs=2,
        epochs=5,
        baseline_epochs=6.5,
        batch_size=100,
        beta=60.0,
        eps=0.5,
        momentum=0.9,
        precondition="muon",
        radius=10.0,
        max_products=16,
        tuning={
            "naive": Tuning(3e-3),
            "distillation": Tuning(3e-3, 0.015),
            "distillation-muon": Tuning(3e-3, 0.015),
            "replay": Tuning(1e-3, 1.0),
            "ewc": Tuning(1e-4, 1e5),
            "gem": Tuning(1e-3, 0.5),
            "lwf": Tuning(1e-4, 100.0),
        },
    ),
}
