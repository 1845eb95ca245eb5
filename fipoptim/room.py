r"""The drift that a budget leaves room for, by which ``beta="auto"`` and the longest step are chosen.

A budget of drift says it itself. A budget of flips leaves room for about the drift at which a random change of the
outputs flips that share of the inputs. An input flips if its margin :math:`\gamma`, the largest score less the second,
is overcome. A random change of squared length D of the m outputs moves the margin by a normal number of standard
deviation :math:`\sigma = \sqrt{2 D / m}`. If the small margins are spread evenly up to :math:`\gamma_q`, their quantile
at the share q, then :math:`q \sigma / (\sqrt{2 \pi} \gamma_q)` of the inputs flip. That is q for

.. math:: D = \pi m \gamma_q^2.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.output_space import classes_last
from fipoptim.anchors.references import References
from fipoptim.budget import Budget

# Margins by the reference they are of, as each step asks for them.
_MARGINS: MutableMapping[References, Tensor] = WeakKeyDictionary()


def room_within(budget: Budget, anchors: AnchorBatch) -> float:
    """The drift that a budget leaves room for; infinite without a budget.

    Args:
        budget: The budget.
        anchors: The anchors; margins are those of the reference outputs on which the budget counts.
    """
    drift = math.inf if budget.max_drift is None else budget.max_drift
    if budget.max_flips is None:
        return drift
    return min(drift, drift_of_flips(anchors.counted, budget.max_flips))


def radius(given: float | None, room: float, check_every: int | None) -> float | None:
    r"""How far one step may move the outputs, RMS over anchors of :math:`\|\Delta z\|`; None bounds nothing.

    A step may go as far as the whole run may: a longer one goes where no later step brings the function back from. If
    the budget holds at every step, the step is shortened to what the budget leaves instead.

    Args:
        given: The radius of the solver, if it has one; the smaller counts.
        room: The drift that the budget leaves room for.
        check_every: When the budget holds, as in :class:`FIPOptimizer`.
    """
    if check_every == 1 or not 0 < room < math.inf:
        return given
    return math.sqrt(room) if given is None else min(given, math.sqrt(room))


def drift_of_flips(counted: AnchorBatch, share: float) -> float:
    """The drift at which a random change of the outputs flips about this share of the inputs."""
    references, shape = counted.references, counted.function.row_shape
    if references not in _MARGINS:
        parts = [margins(part.reshape(-1, *shape)) for part in counted.reference_parts()]
        _MARGINS[references] = counted.ranks.gathered(torch.cat(parts), len(counted))
    quantile = float(torch.quantile(_MARGINS[references], share))
    return math.pi * counted.width * quantile**2


def margins(reference: Tensor) -> Tensor:
    """How far each input is from another prediction, in float64, shape ``(N,)``.

    Args:
        reference: The outputs, in the shape of the output space. An input flips if one of its predictions does.
    """
    scores = classes_last(reference)
    if scores.shape[-1] == 1:  # predicts by its sign
        return 2**0.5 * scores.squeeze(-1).abs().amin(dim=1).double()
    first, second = scores.topk(2).values.unbind(-1)
    return (first - second).amin(dim=1).double()
