"""The settings of ``recipes.new_task``, and their defaults for each family of data sets."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.common.options import COUNT, RATE
from recipes.common.settings import option
from recipes.continual.methods.distillation import DistillationOptions
from recipes.continual.methods.distillation_muon import MuonOptions
from recipes.continual.methods.ewc import EWCOptions
from recipes.continual.methods.fip import PathOptions
from recipes.continual.methods.gem import GEMOptions
from recipes.continual.methods.lwf import LwFOptions
from recipes.continual.methods.plain import AdamOptions
from recipes.continual.methods.replay import ReplayOptions
from recipes.continual.settings import ContinualSettings


@dataclass(frozen=True, kw_only=True)
class NewTaskSettings(ContinualSettings):
    """How both tasks are learnt; every field made by ``option`` is an option of the command line.

    Attributes:
        task1_epochs: Passes over task 1.
        epochs: Passes of the path over task 2.
        baseline_epochs: Passes of the other methods, which get as much time as the path or more.
        batch_size: Inputs of a training step.
        task1_lr: Adam's highest learning rate on task 1.
    """

    task1_epochs: int = option("epochs on task 1", **COUNT)
    epochs: float = option("epochs of the path on task 2", **RATE)
    baseline_epochs: float = option("epochs of the other methods on task 2", **RATE)
    batch_size: int = option("inputs of a training step", **COUNT)
    task1_lr: float = option("Adam's highest learning rate on task 1", default=3e-3, **RATE)

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
        methods={
            "fip": PathOptions(beta=10.0, eps=0.8, max_products=8),
            "naive": AdamOptions(lr=3e-3),
            "distillation": DistillationOptions(lr=1e-2, strength=0.03),
            "distillation-muon": MuonOptions(lr=1e-2, strength=0.03),
            "replay": ReplayOptions(lr=3e-3, strength=1.0),
            "ewc": EWCOptions(lr=3e-3, strength=100.0),
            "gem": GEMOptions(lr=3e-3, strength=0.5),
            "lwf": LwFOptions(lr=3e-3, strength=1.0),
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
        methods={
            "fip": PathOptions(
                beta=60.0, eps=0.5, momentum=0.9, precondition="muon", radius=10.0, max_products=16
            ),
            "naive": AdamOptions(lr=3e-3),
            "distillation": DistillationOptions(lr=3e-3, strength=0.015),
            "distillation-muon": MuonOptions(lr=3e-3, strength=0.015),
            "replay": ReplayOptions(lr=1e-3, strength=1.0),
            "ewc": EWCOptions(lr=1e-4, strength=1e5),
            "gem": GEMOptions(lr=1e-3, strength=0.5),
            "lwf": LwFOptions(lr=1e-4, strength=100.0),
        },
    ),
}
