"""How an updated network is measured: what it knows, what it has unlearnt, and whether it kept its budget."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from fipoptim import certify
from fipoptim.anchors.output_space import probabilities
from recipes.common.training import outputs
from recipes.update.case import AT_ONCE, Case
from recipes.update.methods.method import Update


class Measures:
    """Compares networks with the old one of a case, on test inputs that no method was given.

    Args:
        case: The case.
    """

    def __init__(self, case: Case) -> None:
        self._case, task = case, case.task
        self._is_old = task.test_labels < case.old_classes
        self._inputs, self._labels = (
            part[self._is_old] for part in (task.test_inputs, task.test_labels)
        )
        before = outputs(case.old, self._inputs, AT_ONCE)
        self._reference = probabilities(before)
        self._before = before.argmax(dim=1)
        self._check_before = outputs(case.old, case.check, AT_ONCE).argmax(dim=1)

    @property
    def old_accuracy(self) -> float:
        """Percent of the test inputs of old classes that the old network gets right."""
        return _percent(self._before == self._labels)

    def record(self, update: Update) -> dict[str, Any]:
        """The figures of a network; shares in percent.

        The negative flips are those test inputs of old classes that were right before and are wrong now. Their relative
        rate divides the share by what it would be if old and new errors had nothing to do with each other: the old
        network's accuracy times the error of the new one.
        """
        task, model = self._case.task, update.model
        found = outputs(model, task.test_inputs, AT_ONCE).argmax(dim=1)
        now = found[self._is_old]
        was_right, is_right = self._before == self._labels, now == self._labels
        negative, positive = was_right & ~is_right, ~was_right & is_right
        by_chance = _percent(was_right) * _percent(~is_right) / 100
        certificate = certify(
            model,
            self._reference,
            self._inputs,
            self._labels,
            output="probabilities",
            chunk_size=AT_ONCE,
        )
        check = outputs(model, self._case.check, AT_ONCE).argmax(dim=1) != self._check_before
        right = found == task.test_labels
        flipped = int(check.sum())
        return {
            "name": update.name,
            "accuracy": _percent(right),
            "accuracy_old": _percent(is_right),
            "accuracy_new": _percent(right[~self._is_old]),
            "negative_flips": int(negative.sum()),
            "negative_flip_rate": _percent(negative),
            "relative_negative_flip_rate": 100 * _percent(negative) / by_chance
            if by_chance
            else 0.0,
            "to_new_classes": int((negative & (now >= self._case.old_classes)).sum()),
            "positive_flip_rate": _percent(positive),
            "old_accuracy_before": self.old_accuracy,
            "old_test_inputs": len(self._labels),
            "check_inputs": len(check),
            "check_flips": flipped,
            "check_flip_rate": _percent(check),
            "budget": update.budget,
            "within": None if update.budget is None else flipped <= update.budget * len(check),
            "labelled_inputs": update.inputs,
            "seconds": update.seconds,
            "account": dict(update.account),
            "certificate": json.loads(certificate.to_json()),
            "text": str(certificate),
        }


def _percent(rows: Tensor) -> float:
    return 100.0 * float(rows.double().mean())
