"""The measurements of an ensemble: accuracies under attacks, and differences of its members."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recipes.common.data import DATASETS, Task
from recipes.common.process_memory import give_back
from recipes.diversity.attack_settings import AttackSettings, size_name
from recipes.diversity.attacks import Joint, Pixels, auto_attack, pgd
from recipes.diversity.beyond import Beyond, Outside
from recipes.diversity.ensembles import Ensemble
from recipes.diversity.measures import (
    Votes,
    activation_norms,
    coherence,
    distance,
    diversity_scores,
    percent,
    probabilities,
)

SCORED = 1000  # test images on which activations and input gradients are compared
PICTURED = 6  # attacked images that are drawn
BINS = 20  # bins of the histogram of coherence


class Evaluation:
    """Attacks on the networks of one data set, and measurements of them.

    Args:
        task: The data, on the device of the networks.
        attacks: The settings of the attacks.
        outside: Images that belong to none of the classes.

    Attributes:
        info: The description of the data set.
        images: The test images in [0, 1], ``(n, channels, h, w)``.
        labels: Their labels ``(n,)``.
    """

    def __init__(self, task: Task, attacks: AttackSettings, outside: Outside) -> None:
        self.task, self.attacks, self.outside = task, attacks, outside
        self.info = DATASETS[task.name]
        self.images = self.info.pixels(task.test_inputs)
        self.labels = task.test_labels

    def pixels(self, network: nn.Module) -> Pixels:
        """The network for images in [0, 1], in eval mode."""
        return Pixels(network, self.info).eval()

    def transferred(self, start: nn.Module, seed: int) -> dict[float, Tensor]:
        """The images that fool the start network, for each size of the attack."""
        count = self.attacks.attack_images
        images, labels = self.images[:count], self.labels[:count]
        pixels = self.pixels(start)
        return {
            eps: self._pgd(pixels, images, labels, eps, seed) for eps in self.attacks.attack_eps
        }

    def accuracies(self, network: nn.Module, attacked: Mapping[float, Tensor]) -> dict[str, float]:
        """The accuracy of a network on attacked images, in percent, by the name of the attack's size."""
        pixels, labels = self.pixels(network), self.labels[: self.attacks.attack_images]
        return {size_name(eps): _accuracy(pixels, x, labels) for eps, x in attacked.items()}

    def measure(
        self, ensemble: Ensemble, start: nn.Module, attacked: Mapping[float, Tensor], seed: int
    ) -> dict[str, Any]:
        """Measures an ensemble.

        Members are in memory one at a time, except for the attack on all of them together.

        Args:
            ensemble: The ensemble.
            start: Its start network.
            attacked: The images that fool the start network, for each size of the attack.
            seed: The seed of the attacks.

        Returns:
            The record of the ensemble.
        """
        members = self._measure_members(ensemble, start, attacked, seed)
        joint = Joint([Pixels(member, self.info) for member in ensemble]).eval()
        images, labels = self._first(self.attacks.white_box_images)
        white_box = self._pgd(joint, images, labels, self.attacks.table_eps, seed)
        shown = {"clean": self.images, "attacked": attacked[self.attacks.table_eps]}
        return {
            **members,
            "white_box_joint": _accuracy(joint, white_box, labels),
            "auto_attack_joint": self._auto_attack(joint, seed),
            "lengths": ensemble.lengths,
            "seconds": ensemble.seconds,
            "shown": self.pictured(joint, shown),
        }

    def pictured(self, model: nn.Module, images: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """The predicted classes of the images that are drawn, which are the first of each kind."""
        return {kind: _classes(model, x[:PICTURED]).tolist() for kind, x in images.items()}

    def _measure_members(
        self, ensemble: Ensemble, start: nn.Module, attacked: Mapping[float, Tensor], seed: int
    ) -> dict[str, Any]:
        clean = Votes(self.labels)
        transfer = {eps: Votes(self.labels[: self.attacks.attack_images]) for eps in attacked}
        white_box: list[float] = []
        norms: list[Tensor] = []
        cosines: list[Tensor] = []
        distances: list[float] = []
        start_pixels = Pixels(start, self.info)
        beyond = Beyond(self.images, self.labels, self.outside, seed)
        images, labels = self._first(self.attacks.white_box_images)
        scored = self._first(SCORED)
        for member in ensemble:
            pixels = Pixels(member, self.info)
            p = probabilities(pixels, self.images)
            clean.add(p)
            beyond.add(pixels, p)
            for eps, x in attacked.items():
                transfer[eps].add(probabilities(pixels, x))
            changed = self._pgd(pixels, images, labels, self.attacks.table_eps, seed)
            white_box.append(_accuracy(pixels, changed, labels))
            norms.append(activation_norms(pixels, scored[0]))
            cosines.append(coherence(pixels, start_pixels, *scored))
            distances.append(distance(member, start))
        return {
            "clean": clean.record(),
            "transfer": {size_name(eps): votes.record() for eps, votes in transfer.items()},
            "white_box_members": white_box,
            "disagreement": clean.disagreement,
            "diversity_by_layer": diversity_scores(norms),
            "coherence": float(torch.cat(cosines).mean()),
            "coherence_histogram": torch.cat(cosines).float().histc(BINS, -1, 1).tolist(),
            "distances": distances,
            **beyond.record(clean.probabilities),
        }

    def _auto_attack(self, joint: nn.Module, seed: int) -> float | None:
        """The accuracy under AutoAttack, in percent; None if it is left out."""
        if not self.attacks.auto_attack_images:
            return None
        images, labels = self._first(self.attacks.auto_attack_images)
        eps, classes = self.attacks.table_eps, self.task.classes
        changed = auto_attack(joint, images, labels, eps, classes=classes, seed=seed)
        return _accuracy(joint, changed, labels)

    def _first(self, count: int) -> tuple[Tensor, Tensor]:
        return self.images[:count], self.labels[:count]

    def _pgd(
        self, network: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int
    ) -> Tensor:
        changed = pgd(
            network.eval(),
            images,
            labels,
            eps,
            steps=self.attacks.attack_steps,
            restarts=self.attacks.attack_restarts,
            seed=seed,
        )
        give_back()
        return changed


def _classes(model: nn.Module, images: Tensor) -> Tensor:
    return probabilities(model, images).argmax(dim=1)


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return percent(_classes(model, images) == labels)
