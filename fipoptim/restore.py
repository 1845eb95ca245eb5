"""Bring back the function of a network that has already changed, whoever trained it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.evaluation import unwrap
from fipoptim.anchors.refusals import check_positive, outputs_not_finite
from fipoptim.budget import Budget
from fipoptim.checks import check_type
from fipoptim.metric.chunks import Form
from fipoptim.metric.forms import Forms
from fipoptim.restoring import Restored, Restoring
from fipoptim.shards import local, named_parameters


def restore(
    model: torch.nn.Module,
    anchors: AnchorBatch,
    *,
    max_drift: float | None = None,
    max_flips: float | None = None,
    params: Iterable[Tensor] | None = None,
    max_products: int = 64,
    keep_zeros: bool = False,
    form: Form | None = None,
) -> Restored:
    r"""Bring a network's outputs on the anchors back to the reference, by restoring steps alone.

    A restoring step solves :math:`(g + \mu I) v = -J^\top r / N` from a few products. It needs neither labels nor the
    gradient of a task. :math:`\mu` is chosen so that the network lands **at** the budget: of all steps that reach it,
    to first order, this one is the shortest, so that what the network has learnt since is changed the least. A
    measurement on all anchors confirms it.

    With ``augment`` each step also sees one augmented view of the anchors. The budget counts on the check inputs of the
    anchors, or on the plain anchors without any.

    Args:
        model: The network, which is the anchors' model.
        anchors: The anchors; :class:`AnchorBatch` with ``reference=`` takes the network of before.
        max_drift: The drift to reach.
        max_flips: The share of inputs whose prediction may differ from the reference's, in [0, 1).
        params: The parameters that may move; None takes those that require a gradient.
        max_products: The most products of all steps together; each costs about a forward and a backward pass over the
            anchors.
        keep_zeros: Weights that are exactly 0 do not move, as in :class:`FIPOptimizer`.
        form: How products are taken, as in :class:`FIPOptimizer`; None probes it.

    Returns:
        The account of it. Without a budget, steps are taken until one lowers the drift by less than a tenth.
        If the budget cannot be reached, the network with the smallest drift found is left, and ``within`` is False.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a budget is out of range, or ``model`` is not the anchors' model.
        RuntimeError: If the outputs are not finite. The weights are then as they were.
    """
    check_type("anchors", anchors, AnchorBatch, "build one with AnchorBatch(model, inputs)")
    if unwrap(model) is not anchors.model:
        raise ValueError("model: is not the anchors' model; build the AnchorBatch on this one.")
    budget = Budget.checked(max_drift, max_flips)
    check_positive("max_products", max_products)
    chosen: list[Tensor] = (
        [p for p in named_parameters(anchors.model).values() if p.requires_grad]
        if params is None
        else list(params)
    )
    found = Restoring(
        anchors,
        chosen,
        budget,
        form=Forms(anchors, form).later(chosen),
        max_products=max_products,
        frozen=[local(p) == 0 for p in chosen] if keep_zeros else None,
    ).run()
    if not math.isfinite(found.before.drift):
        raise outputs_not_finite()
    return found
