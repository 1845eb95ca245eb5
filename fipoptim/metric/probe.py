"""The probe: are the Jacobian-vector products of a model right?

A few of the anchors tell. The derivative has to agree with the backward pass, and with differences of the outputs along
a line in weight space (see :mod:`fipoptim.metric.finite_difference`).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.inputs import select_inputs
from fipoptim.anchors.refusals import check_width, is_finite
from fipoptim.anchors.sharded import ShardedFunction
from fipoptim.metric.chunks import EagerChunk, Form
from fipoptim.metric.finite_difference import (
    Difference,
    Line,
    Precision,
    inner_product,
    listed,
    norm_of,
)
from fipoptim.metric.parameters import parameter_names
from fipoptim.metric.point import Point

# How many anchors are looked at, spread over all of them.
ANCHORS = 8
# The seeds of further lines. An error counts only if one of them shows it too.
OTHER_SEEDS = (1, 2)
# The relative error of J v, beyond what the finite difference allows for, that makes the derivative wrong.
ERROR = 0.02
# Parts into which the parameters are divided at most to say where an error comes from.
PARTS = 32
FORMS: tuple[Form, Form] = ("forward", "double-vjp")


@contextlib.contextmanager
def _whole_float32() -> Iterator[None]:
    """Compute in float32 on a GPU, and not in TF32, whose rounding is larger than a finite difference."""
    backends: Any = torch.backends  # torch adds the attributes of its layers at run time
    layers = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [layer.fp32_precision for layer in layers]
    try:
        for layer in layers:
            layer.fp32_precision = "ieee"
        yield
    finally:
        for layer, precision in zip(layers, before, strict=True):
            layer.fp32_precision = precision


@_whole_float32()
@torch.inference_mode(False)
def probe(anchors: AnchorBatch, params: Sequence[Tensor]) -> Form:
    """Find the form of Jacobian-vector product that is right for this model, on a few of the anchors.

    It checks that the outputs are the same under another random seed, that ``<Jv, u> = <v, J^T u>`` with the backward
    pass, and that ``J v`` is the slope of a finite difference. The last check finds what the second cannot: reentrant
    activation checkpointing drops the same terms from both sides.

    A model that has products of neither form gets finite differences, with a warning, if they agree with the backward
    pass.

    Nothing is probed if :class:`~fipoptim.AnchorMetric` or :class:`~fipoptim.FIPOptimizer` is given its ``form``.

    Args:
        anchors: The anchors.
        params: The parameters to differentiate by, all of the anchors' model.

    Raises:
        ValueError: If the model is random in eval mode, or gives another number of outputs than the reference has.
        RuntimeError: If no form is right, with what was seen, for which outputs and parameters, the likely cause
            and what to do; or if the model writes to its parameters as it is evaluated.
    """
    if isinstance(anchors.function, ShardedFunction):
        _refuse_half_precision(anchors)
        return "finite-difference"
    causes: list[str] = []
    wrong: list[bool] = []
    with anchors.function.evaluation(tangents=True):
        looks = [_Look(anchors, params, seed=0)]
        for form in FORMS:
            cause, gives_products = _cause_against(form, looks, anchors, params)
            wrong.append(gives_products)
            if cause is None:
                if causes:
                    warnings.warn(
                        f"fipoptim: forward-mode products are not available for this model ({causes[0]}); "
                        'using the double-VJP form, which is right but slower. form="double-vjp" asks for it.',
                        stacklevel=5,
                    )
                return form
            causes.append(cause)
        # A model that has no forward mode, and a backward pass that cannot be differentiated, may still be right.
        if not wrong[0] and _cause_against("finite-difference", looks, anchors, params)[0] is None:
            warnings.warn(
                "fipoptim: this model has neither forward-mode products nor those of a double backward pass "
                f"({causes[0]}; {causes[1]}); taking them by finite differences of its outputs, which are less "
                'precise. form="finite-difference" asks for it.',
                stacklevel=5,
            )
            return "finite-difference"
    raise _no_form_is_right(causes, wrong)


def check_form(anchors: AnchorBatch, form: Form | None, *, compile: bool) -> None:
    """Refuse a form that the anchors' model does not have, and a trace to compile.

    Raises:
        ValueError: If the model is fully sharded, whose products are finite differences.
    """
    if not isinstance(anchors.function, ShardedFunction):
        return
    if form not in (None, "finite-difference"):
        raise ValueError(
            f"form: {form!r} does not run the hooks of a fully sharded model; give None or 'finite-difference'."
        )
    if compile:
        raise ValueError("compile: a fully sharded model is not traced; leave it out.")


def _refuse_half_precision(anchors: AnchorBatch) -> None:
    """Refuse a fully sharded model that computes in half precision, in which small differences are rounding.

    Raises:
        RuntimeError: With what to use.
    """
    with anchors.function.evaluation(), Precision() as precision:
        anchors.function.outputs(anchors.chunks(anchors.own)[:1])
    if precision.eps > torch.finfo(torch.float32).eps:
        raise RuntimeError(
            "model: is fully sharded and computes in half precision, so that a product, a difference of outputs, would "
            "be rounding. Take steps without products, by Solver(products=0), or leave param_dtype out of the "
            "MixedPrecisionPolicy."
        )


def _cause_against(
    form: Form, looks: list[_Look], anchors: AnchorBatch, params: Sequence[Tensor]
) -> tuple[str | None, bool]:
    """Why products of a form are not right, or None; and whether there are any.

    Args:
        form: The form.
        looks: The looks at the model so far, at least one. Further ones are added if the first finds a fault.
        anchors: The anchors.
        params: The parameters.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cause = looks[0].fault(form)
            if cause is not None:
                # A line with few numbers can find an error by bad luck; a real one shows on another line too.
                looks += [_Look(anchors, params, seed) for seed in OTHER_SEEDS[len(looks) - 1 :]]
                if all(look.fault(form) is None for look in looks[1:]):
                    cause = None
        return cause, True
    except (RuntimeError, NotImplementedError, TypeError) as error:
        words = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {words[0]}", False


def _no_form_is_right(causes: list[str], wrong: list[bool]) -> RuntimeError:
    """The error for a model without a right form.

    Args:
        causes: The fault of each of :data:`FORMS`.
        wrong: For each form whether it gives products, which are wrong; False if it gives none.
    """
    if causes[0] == causes[1]:
        seen = f"Forward mode and double VJP: {causes[0]}."
    else:
        seen = f"Forward mode: {causes[0]}. Double VJP: {causes[1]}."
    advice = (
        "Common causes: reentrant activation checkpointing (set use_reentrant=False), outputs that were detached or "
        "computed under no_grad, custom autograd functions without a differentiable backward, hooks that change "
        "gradients, fused attention kernels called directly. Parameters that are not to be moved can be left out."
    )
    if any(wrong):
        form = FORMS[wrong.index(True)]
        advice += (
            " If you know these derivatives to be the ones you want, as those of a straight-through estimator, "
            f'give form="{form}" to FIPOptimizer or AnchorMetric, which then do not check it.'
        )
    return RuntimeError(
        f"model: no form of Jacobian-vector product is right for it. {seen} {advice}"
    )


class _Look:
    """Products at two points of weight space, on a few anchors, and differences along one line."""

    def __init__(self, anchors: AnchorBatch, params: Sequence[Tensor], seed: int) -> None:
        names = parameter_names(anchors.model, params)
        # The outputs of an anchor can depend on its chunk, so the anchors looked at are at most one chunk.
        number = min(ANCHORS, len(anchors), anchors.chunk_size or len(anchors))
        spread = [i * (len(anchors) - 1) // max(1, number - 1) for i in range(number)]
        self._inputs = select_inputs(anchors.inputs, torch.tensor(spread, device="cpu"))
        self._point = Point(anchors.function, anchors.weights(), names)
        self._line = Line(self._point, self._inputs, anchors.padding_rows(), seed)
        check_width(self._line.outputs, anchors.references.like)

    # --- the checks ---------------------------------------------------------------------------------------

    def fault(self, form: Form) -> str | None:
        """The fault of products of this form, or None."""
        line = self._line
        for parameters in (line.here, line.near):
            chunk = EagerChunk(self._point.function_on(self._inputs), parameters, form)
            jv, jtu = chunk.jvp(line.direction), chunk.vjp(line.cotangent)
            fault = self._not_adjoint(jv, [x.to_dense() for x in jtu], form)
            if fault is not None:
                return fault
        return self._not_the_slope(chunk, jv)

    def _not_adjoint(self, jv: Tensor, jtu: list[Tensor], form: Form) -> str | None:
        line = self._line
        broken = [name for name, x in zip(self._point.names, jtu, strict=True) if not is_finite(x)]
        if broken or not is_finite(jv):
            by = f" by {listed(broken)}" if broken else ""
            return f"its derivatives{by} are not finite"
        left = inner_product([jv], [line.cotangent])
        right = inner_product(line.direction, jtu)
        size = max(
            norm_of([jv]) * norm_of([line.cotangent]), norm_of(line.direction) * norm_of(jtu)
        )
        error = abs(left - right)
        double = line.eps <= torch.finfo(torch.float64).eps
        tolerance = 1e-8 if double else max(1e-3, 4 * line.eps)
        if form == "finite-difference":
            tolerance = 1e-3
        kind = torch.finfo(jv.dtype)
        # Numbers that are almost too small, or whose squares are, have fewer digits.
        smallest = max(kind.tiny / kind.eps, 1e-140) * norm_of([line.cotangent])
        if error <= tolerance * size + smallest:
            return None
        return (
            f"the tangent and the backward pass disagree by {_percent(error / max(size, smallest))}: "
            f"<Jv, u> = {left:.6g} but <v, J^T u> = {right:.6g}, as if an operation or hook had a backward of its own"
        )

    def _not_the_slope(self, chunk: EagerChunk, jv: Tensor) -> str | None:
        for difference in self._line.differences():
            scale = max(norm_of([jv]), norm_of([difference.slope]))
            if difference.allowance <= ERROR * scale and (
                norm_of([difference.slope - jv]) <= ERROR * scale
            ):
                return None
        found = sorted(self._line.differences(), key=lambda d: d.step)
        telling: list[Difference] = []
        for difference in found:
            if difference.still:
                continue  # the step is too small for the precision inside the model
            scale = max(norm_of([jv]), norm_of([difference.slope]))
            if difference.spread > max(4 * difference.rounding, scale / 4):
                break  # longer steps do not resolve what varies within so small a step
            telling.append(difference)
        if all(difference.still for difference in found):
            telling = found[-1:]
        if not telling:
            return None
        best = min(telling, key=lambda d: d.allowance)
        return self._verdict(chunk, jv, best) if _differs(jv, best) else None

    # --- what is said of an error -----------------------------------------------------------------------------

    def _verdict(self, chunk: EagerChunk, jv: Tensor, best: Difference) -> str:
        error = norm_of([best.slope - jv]) / max(norm_of([jv]), norm_of([best.slope]))
        columns = [
            k
            for k, (a, b) in enumerate(zip(jv.double().T, best.slope.T, strict=True))
            if norm_of([a - b]) > 0.1 * max(norm_of([a]), norm_of([b]))
        ]
        outputs = jv.shape[1]
        where = f"output {_few(columns)} of {outputs}"
        if len(columns) in (0, outputs):
            where = f"all {outputs} outputs"
        names, causes = self._concerned(chunk, best.step)
        by = f" by {listed(names)}" if names else ""
        rounding = ""
        if self._line.eps > 1e-4:
            rounding = (
                " Part of the model is in half precision, whose rounding has been allowed for."
            )
        return (
            f"J v differs from a finite difference by {_percent(error)}, although it agrees with the backward pass: "
            f"the derivatives of {where}{by} are not those of what the model computes ({'; '.join(causes)})"
            f"{rounding}"
        )

    def _concerned(self, chunk: EagerChunk, step: float) -> tuple[list[str], list[str]]:
        """The parameters whose derivatives differ, and what that looks like."""
        all_names, direction = self._point.names, self._line.direction
        count = len(all_names)
        size = math.ceil(count / PARTS)
        names: list[str] = []
        causes: dict[str, None] = {}
        for start in range(0, count, size):
            part = [start <= i < start + size for i in range(count)]
            tangents = [
                v if moves else torch.zeros_like(v)
                for v, moves in zip(direction, part, strict=True)
            ]
            jv, difference = chunk.jvp(tangents), self._line.difference(step, part)
            if not _differs(jv, difference):
                continue
            names += all_names[start : start + size]
            causes[_likeness(jv.double(), difference.slope)] = None
        return names, list(causes) or ["too little to be seen in a single part of them"]


def _differs(jv: Tensor, difference: Difference) -> bool:
    """Whether J v is further from the slope than kinks, curvature, rounding and :data:`ERROR` allow."""
    scale = max(norm_of([jv]), norm_of([difference.slope]))
    return norm_of([difference.slope - jv]) > 2 * difference.allowance + ERROR * scale


def _likeness(jv: Tensor, slope: Tensor) -> str:
    """A description of a wrong derivative, compared with the slope."""
    if norm_of([jv]) <= 1e-6 * norm_of([slope]):
        return "autograd finds no dependence where there is one: detach, no_grad, reentrant checkpointing"
    if norm_of([slope]) <= 1e-6 * norm_of([jv]):
        return "autograd finds a dependence where there is none: rounding with a straight-through estimator"
    factor = inner_product([jv], [slope]) / (inner_product([jv], [jv]) or 1.0)
    if factor and norm_of([slope - factor * jv]) <= ERROR * norm_of([slope]):
        return (
            f"autograd's are {1 / factor:.3g} times the right ones: a hook or custom function that scales or "
            "reverses gradients"
        )
    return "part of the network is missing or another: detach, reentrant checkpointing, a backward of its own"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _few(numbers: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"
