"""What has changed between two networks on inputs that neither was adjusted on, with bounds and a confidence."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.batches import checked_inputs
from fipoptim.anchors.inputs import (
    Inputs,
    count_inputs,
    named_tensors,
)
from fipoptim.anchors.output_space import (
    OutputMap,
    flatten_outputs,
    predictions,
    squared_distance,
)
from fipoptim.bounds import MeanDrift, Share, corrected, inputs_needed, mean_of, share_of
from fipoptim.checks import check_number
from fipoptim.optional import import_for
from fipoptim.outputs import compared_outputs

IGNORED = -100  # the label of a position without a label, as for torch's losses


class BudgetExceeded(Exception):
    """A certificate does not bound a change by what :meth:`Certificate.require` was asked for."""


@dataclass(frozen=True)
class Changes:
    """The changes on one set of inputs.

    Attributes:
        inputs: The number of inputs.
        flips: Inputs whose prediction changed. An input with several predictions, one at each token or pixel, counts if
            any of them changed.
        negative_flips: Inputs with a prediction that was right before and is wrong now; None without labels.
        drift: The mean drift of the outputs.
    """

    inputs: int
    flips: Share
    negative_flips: Share | None
    drift: MeanDrift


@dataclass(frozen=True)
class Certificate:
    """What has changed, in all and by group.

    Bounds hold for inputs drawn independently from one distribution, of which these are a sample that had no part in
    changing the network. Each overall bound holds with the confidence, by itself. The bounds of a figure for all groups
    hold together with the confidence (Bonferroni).

    Attributes:
        confidence: The confidence.
        overall: The changes on all inputs.
        groups: The changes on each group of inputs; empty without groups.
    """

    confidence: float
    overall: Changes
    groups: Mapping[Hashable, Changes]

    @property
    def flips(self) -> Share:
        """Inputs whose prediction changed."""
        return self.overall.flips

    @property
    def negative_flips(self) -> Share | None:
        """Inputs with a prediction that was right before and is wrong now; None without labels."""
        return self.overall.negative_flips

    @property
    def drift(self) -> MeanDrift:
        """The mean drift of the outputs."""
        return self.overall.drift

    def require(
        self,
        *,
        max_flips: float | None = None,
        max_negative_flips: float | None = None,
        max_drift: float | None = None,
    ) -> None:
        """Raise unless the bounds, overall and of each group, are within the budgets.

        Args:
            max_flips: The largest share of inputs whose prediction may have changed.
            max_negative_flips: The largest share of inputs that may have been right and be wrong now.
            max_drift: The largest mean drift.

        Raises:
            BudgetExceeded: If a bound is larger. The message has the figure, and the number of inputs that it would
                take if these are too few even without a single flip.
            ValueError: If a budget is not given at all, is out of range, or concerns labels that were not given.
        """
        budgets = {
            "max_flips": max_flips,
            "max_negative_flips": max_negative_flips,
            "max_drift": max_drift,
        }
        if all(value is None for value in budgets.values()):
            raise ValueError(f"require: give at least one of {', '.join(budgets)}.")
        for name, value in budgets.items():
            if value is not None:
                check_number(name, value, below=math.inf if name == "max_drift" else 1.0)
        if max_negative_flips is not None and self.negative_flips is None:
            raise ValueError("max_negative_flips: needs labels, and certify() got none.")
        for group, changes in [(None, self.overall), *self.groups.items()]:
            where = "" if group is None else f" in group {group!r}"
            level = self.confidence if group is None else self._group_confidence
            _check_share("max_flips", "predictions changed", changes.flips, max_flips, where, level)
            if changes.negative_flips is not None:
                _check_share(
                    "max_negative_flips",
                    "predictions were right and are wrong now",
                    changes.negative_flips,
                    max_negative_flips,
                    where,
                    level,
                )
            if max_drift is not None and not changes.drift.bound <= max_drift:
                raise BudgetExceeded(
                    f"max_drift: the mean drift{where} is {changes.drift.rate:.3g}, at most "
                    f"{changes.drift.bound:.3g} with {_percent(level)} confidence; {max_drift:g} was required."
                )

    @property
    def _group_confidence(self) -> float:
        return corrected(self.confidence, len(self.groups))

    def to_json(self) -> str:
        """Everything as JSON. Groups have their names as text, and a bound that is not known is null."""
        return json.dumps(
            {
                "confidence": self.confidence,
                "overall": _plain(self.overall),
                "groups": {str(name): _plain(changes) for name, changes in self.groups.items()},
            },
            indent=2,
        )

    def __str__(self) -> str:
        """A table: the figures with their bounds, overall and by group."""
        lines = [
            f"Certificate on {self.overall.inputs:,} inputs, with {_percent(self.confidence)} confidence",
            f"{'':32s}{'inputs':>9s}{'changed':>9s}{'share':>9s}{'at most':>9s}",
        ]
        for name, changes in [("", self.overall), *self.groups.items()]:
            prefix = "" if name == "" else f"{name}: "
            lines.append(_line(f"{prefix}predictions changed", changes.flips))
            if changes.negative_flips is not None:
                lines.append(_line(f"{prefix}right before, wrong now", changes.negative_flips))
            drift = changes.drift
            lines.append(
                f"{f'{prefix}mean drift':32s}{changes.inputs:9,}{'':9s}{drift.rate:9.3g}{drift.bound:9.3g}"
            )
        return "\n".join(lines)


def certify(
    model: nn.Module,
    reference: nn.Module | Tensor,
    inputs: Any,
    labels: Tensor | None = None,
    *,
    confidence: float = 0.95,
    groups: Sequence[Hashable] | Tensor | None = None,
    output: str | OutputMap = "logits",
    chunk_size: int = 256,
) -> Certificate:
    """Compare a network with its reference on inputs that had no part in changing it.

    Both networks are evaluated as anchors are: in eval mode, without autocast, chunk by chunk.

    Args:
        model: The network of now.
        reference: The network of before, or its outputs on ``inputs``, as ``output`` gives them, with one row an input.
        inputs: The inputs along dimension 0, in any of the forms that :class:`AnchorBatch` takes. They should be a
            random sample of the inputs that count, and **not** be anchors: a warning says if some are.
        labels: The right classes, whole numbers of shape ``(N,)`` or, for several predictions an input, of their shape;
            -100 marks a position without a label.
        confidence: The confidence of the bounds.
        groups: The group of each input, N hashable values or a tensor ``(N,)``.
        output: The space in which outputs are compared, as of :class:`AnchorBatch`. Predictions are those of what it
            gives.
        chunk_size: Inputs evaluated at a time.

    Returns:
        The certificate. It prints as a table.

    Raises:
        ImportError: If scipy is not installed.
        TypeError: If an argument has the wrong type.
        ValueError: If numbers of inputs disagree, ``confidence`` is not in (0, 1), or outputs are not finite or of
            another shape than the reference's.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: must be in (0, 1), got {confidence!r}.")
    import_for("certify", "scipy.stats")
    checked = checked_inputs(inputs)
    count = count_inputs(checked)
    now, before = compared_outputs(model, reference, checked, output, chunk_size)
    _warn_of_anchors(model, checked)
    then, after = predictions(before), predictions(now)
    flipped = (then != after).any(dim=1).cpu()
    negative = None
    if labels is not None:
        right = _checked_labels(labels, after)
        negative = ((then == right) & (after != right) & (right != IGNORED)).any(dim=1).cpu()
    drifts = squared_distance(flatten_outputs(now, count), flatten_outputs(before, count)).cpu()

    def changes(rows: Tensor, level: float) -> Changes:
        return Changes(
            len(rows),
            share_of(flipped[rows], level),
            None if negative is None else share_of(negative[rows], level),
            mean_of(drifts[rows], level),
        )

    members = _members(groups, count)
    level = corrected(confidence, len(members))
    return Certificate(
        confidence,
        changes(torch.arange(count), confidence),
        {group: changes(rows, level) for group, rows in members.items()},
    )


# --- arguments ---------------------------------------------------------------------------------------------


def _checked_labels(labels: Tensor, classes: Tensor) -> Tensor:
    """The labels in the shape ``(N, positions)`` of the predictions."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: must be a tensor of whole numbers, got {got}.")
    if labels.numel() != classes.numel() or len(labels) != len(classes):
        raise ValueError(
            f"labels: must have one entry for each of the {tuple(classes.shape)} predictions, got shape "
            f"{tuple(labels.shape)}."
        )
    return labels.reshape(classes.shape).to(classes)


def _members(groups: Sequence[Hashable] | Tensor | None, count: int) -> dict[Hashable, Tensor]:
    """The rows of each group, groups in the order in which they appear."""
    if groups is None:
        return {}
    names = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(names) != count:
        raise ValueError(f"groups: must name a group for each of {count} inputs, got {len(names)}.")
    members: dict[Hashable, list[int]] = {}
    for row, name in enumerate(names):
        members.setdefault(name, []).append(row)
    return {name: torch.tensor(rows) for name, rows in members.items()}


def _warn_of_anchors(model: nn.Module, inputs: Inputs) -> None:
    """Warn if some inputs are anchors of this model."""
    known: set[tuple[float, ...]] = set()
    for anchors in AnchorBatch.of_model(model):
        known.update(_marks(anchors.inputs))
    found = sum(mark in known for mark in _marks(inputs)) if known else 0
    if found:
        warnings.warn(
            f"inputs: {found} of {count_inputs(inputs)} are anchors of this model, which was adjusted on them. The "
            "certificate says nothing of other inputs then; give inputs that were held out.",
            stacklevel=3,
        )


def _marks(inputs: Inputs) -> list[tuple[float, ...]]:
    """Numbers by which each input is known again: two fixed random projections of each of its tensors."""
    columns = []
    for x in named_tensors(inputs).values():
        rows = x.detach().reshape(len(x), -1).to("cpu", torch.float64)
        seeded = torch.Generator("cpu").manual_seed(0)
        signs = torch.randn(rows.shape[1], 2, generator=seeded, dtype=torch.float64, device="cpu")
        # One by one, as a product of matrices may sum in another order for another number of rows.
        columns.append(torch.stack([(rows * sign).sum(dim=1) for sign in signs.T], dim=1))
    return [tuple(row) for row in torch.cat(columns, dim=1).tolist()]


# --- text --------------------------------------------------------------------------------------------------


def _check_share(
    name: str, what: str, share: Share, most: float | None, where: str, confidence: float
) -> None:
    if most is None or share.bound <= most:
        return
    message = (
        f"{name}: {share.count} of {share.inputs} {what}{where}, at most {_percent(share.bound)} with "
        f"{_percent(confidence)} confidence; {_percent(most)} was required."
    )
    if most == 0:
        message += " No number of inputs can certify a share of 0."
    elif share.inputs < (needed := inputs_needed(most, confidence)):
        message += (
            f" These inputs are too few: it takes at least {needed}, even if nothing changes."
        )
    raise BudgetExceeded(message)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _line(text: str, share: Share) -> str:
    return f"{text:32s}{share.inputs:9,}{share.count:9,}{_percent(share.rate):>9s}{_percent(share.bound):>9s}"


def _plain(changes: Changes) -> dict[str, Any]:
    plain = asdict(changes)
    plain["drift"] = {k: x if math.isfinite(x) else None for k, x in plain["drift"].items()}
    for name in ("flips", "negative_flips"):
        share: Share | None = getattr(changes, name)
        if share is not None:
            plain[name]["rate"] = share.rate
    return plain
