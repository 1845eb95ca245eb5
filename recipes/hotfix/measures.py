"""How a fixed network is measured, and which of a method's networks is its result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fipoptim import certify
from fipoptim.certificate import Certificate
from recipes.common.training import outputs
from recipes.hotfix.case import AT_ONCE, Case, Unseen
from recipes.hotfix.methods.method import Trial, count_right


class Measures:
    """Compares networks with the old one of a case.

    Args:
        case: The case.
        unseen: The inputs that no method was given.
    """

    def __init__(self, case: Case, unseen: Unseen) -> None:
        self._case, self._unseen = case, unseen
        self._check_before = outputs(case.old, case.check, AT_ONCE)
        self._unseen_before = outputs(case.old, unseen.inputs, AT_ONCE)

    def on_check(self, trial: Trial) -> dict[str, Any]:
        """What a method may choose by: how many are right, and how much has changed on the check inputs."""
        before = self._check_before
        now = outputs(trial.model, self._case.check, AT_ONCE)
        return {
            "fixed": count_right(trial.model, self._case),
            "flips_check": int((now.argmax(dim=1) != before.argmax(dim=1)).sum()),
            "drift_check": _drift(now, before),
        }

    def on_unseen(self, trial: Trial) -> Certificate:
        """The certificate on the unseen inputs."""
        return certify(
            trial.model,
            self._unseen_before,
            self._unseen.inputs,
            self._unseen.labels,
            chunk_size=AT_ONCE,
        )

    def record(self, trials: Sequence[Trial]) -> tuple[int, dict[str, Any]]:
        """Chooses on the check inputs, and measures all on the unseen ones.

        Returns:
            The index of the network that is the result, and the record of the method: the figures of that network,
            its certificate, and the figures of every trial.
        """
        found = []
        for trial in trials:
            certificate = self.on_unseen(trial)
            negative = certificate.negative_flips
            found.append(
                {
                    **self.on_check(trial),
                    "flips_unseen": certificate.flips.count,
                    "negative_flips_unseen": None if negative is None else negative.count,
                    "drift_unseen": certificate.drift.rate,
                    "steps": trial.steps,
                    "seconds": trial.seconds,
                    "choice": dict(trial.choice),
                    "account": dict(trial.account),
                    "certificate": json.loads(certificate.to_json()),
                    "text": str(certificate),
                }
            )
        best = min(range(len(found)), key=lambda k: _merit(found[k]))
        trials_told = [
            {key: value for key, value in entry.items() if key not in ("certificate", "text")}
            for entry in found
        ]
        return best, {**found[best], "trials": trials_told}


def _merit(entry: dict[str, Any]) -> tuple[float, float, float]:
    """The most right, then the fewest flips, then the least drift, all known without the unseen inputs."""
    return -entry["fixed"], entry["flips_check"], entry["drift_check"]


def _drift(now: Tensor, before: Tensor) -> float:
    return float((now - before).square().sum(dim=1).mean())
