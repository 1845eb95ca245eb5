"""How a fine-tuned network is measured."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fipoptim import certify
from fipoptim.certificate import Certificate
from recipes.finetune.case import AT_ONCE, IGNORED, Case, Examples, Unseen, evaluated


class Measures:
    """Compares networks with the start, on inputs that no method was given.

    Args:
        case: What the methods are given.
        unseen: The inputs.
    """

    def __init__(self, case: Case, unseen: Unseen) -> None:
        self._unseen, self._output = unseen, case.output
        self._held = evaluated(case.start, unseen.queries, case.output)
        self._scores = self._scored(self._held)

    def point(self, model: nn.Module) -> dict[str, Any]:
        """The figures of a network.

        Returns:
            ``accuracy`` in percent and ``nll`` in nats on the new examples; ``drift``, the mean squared distance of the
            held outputs from the start's; ``kept``, the percentage of predictions that have stayed; the certificate of
            both, as JSON and as text.
        """
        certificate = self.certificate(model)
        return {
            **learnt(model, self._unseen.test),
            "drift": certificate.drift.rate,
            "kept": 100 * (1 - certificate.flips.rate),
            "certificate": json.loads(certificate.to_json()),
            "text": str(certificate),
        }

    def certificate(self, model: nn.Module) -> Certificate:
        """The predictions that have changed, and the drift of the held outputs, with a confidence of 95 % each."""
        now = evaluated(model, self._unseen.queries, self._output)
        predictions = certify(nn.Identity(), self._scores, self._scored(now))
        drift = certify(nn.Identity(), self._held, now).drift
        overall = dataclasses.replace(predictions.overall, drift=drift)
        return dataclasses.replace(predictions, overall=overall)

    @torch.no_grad()
    def _scored(self, held: Tensor) -> Tensor:
        scores: Tensor = self._unseen.predictions(held)
        return scores


@torch.no_grad()
def learnt(model: nn.Module, test: Examples) -> dict[str, float]:
    """``accuracy`` in percent and ``nll`` in nats, over examples or over positions with a label."""
    right, nats, total = 0.0, 0.0, 0
    for rows in torch.arange(len(test)).split(AT_ONCE):
        some = test.at(rows)
        there = some.labels != IGNORED
        z, labels = model(**some.inputs).learnt[there], some.labels[there]
        right += float((z.argmax(dim=-1) == labels).sum())
        nats += float(F.cross_entropy(z, labels, reduction="sum"))
        total += len(labels)
    return {"accuracy": 100 * right / total, "nll": nats / total}
