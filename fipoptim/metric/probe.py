"""The probe: are the Jacobian-vector products of a model right?

A few of the anchors tell. The derivative is compared with differences of the outputs along a line, not at today's
weights but beside them: a trained, pruned or freshly adapted network often lies exactly on kinks (dead units, tied
maxima, zeros of LoRA), where a difference is a mean of two slopes and the derivative is one of them. How far the
two may be apart is measured on the same line, so that kinks, curvature and the rounding of the coarsest precision
inside the model are allowed for.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fipoptim.anchors.batch import AnchorBatch, Weights, check_width, evaluation
from fipoptim.metric.behaviour import RANDOM
from fipoptim.metric.metric import Form, Parameters, _EagerChunk, parameter_names
from fipoptim.metric.trace import close

# How many anchors are looked at, spread over all of them.
ANCHORS = 8
# How far from today's weights the derivative is compared, in units of each parameter's root mean square (of one that is
# zero ten times as far, as it lets nothing through); less far where the outputs are not finite.
DISTANCES = (0.1, 1e-3, 0.0)
# Steps along the line in the same units: those that settle most models come first.
STEPS = (1e-3, 1e-2, 1e-4, 1e-1, 5e-1, 1e-5, 1e-6, 1e-7)
# The seeds of further lines, one of which has to confirm an error before it is believed.
OTHERS = (1, 2)
# The relative error of J v that is an error, beyond what is allowed for.
ERROR = 0.02
# Parts into which the parameters are divided at most to say where an error comes from.
PARTS = 32


@contextlib.contextmanager
def _whole_float32() -> Iterator[None]:
    """On a GPU products and convolutions in float32 are not rounded to TF32, which a finite difference drowns in."""
    backends: Any = torch.backends  # whose layers torch makes at run time
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

    Checked are: the same outputs under another random seed, ``<Jv, u> = <v, J^T u>`` with the backward pass,
    and ``J v`` against a finite difference. The last one finds what the second cannot: reentrant activation
    checkpointing drops the same terms from both sides.

    Who knows the model better gives :class:`~fipoptim.AnchorMetric` or :class:`~fipoptim.FIPOptimizer` its ``form``,
    and nothing is probed.

    Raises:
        ValueError: If the model is random in eval mode, or gives another number of outputs than the reference has.
        RuntimeError: If neither form is right, with what was seen, where, the likely cause and what to do; or if the
            model writes to its parameters as it is evaluated.
    """
    causes: list[str] = []
    wrong: list[bool] = []
    forms: tuple[Form, Form] = ("forward", "double-vjp")
    with evaluation(anchors.model, anchors.device):
        lines = [_Probed(anchors, params, seed=0)]
        for form in forms:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    cause = lines[0].fault(form)
                    if cause is not None:
                        # Few numbers can be unlucky: what is wrong is so along another line too.
                        lines += [
                            _Probed(anchors, params, seed) for seed in OTHERS[len(lines) - 1 :]
                        ]
                        if all(line.fault(form) is None for line in lines[1:]):
                            cause = None
                wrong.append(True)
            except (RuntimeError, NotImplementedError, TypeError) as error:
                words = str(error).strip().splitlines() or [""]
                cause = f"{type(error).__name__}: {words[0]}"
                wrong.append(False)
            if cause is None:
                if causes:
                    warnings.warn(
                        f"fipoptim: forward-mode products are not available for this model ({causes[0]}); "
                        'using the double-VJP form, which is right but slower. form="double-vjp" asks for it.',
                        stacklevel=5,
                    )
                return form
            causes.append(cause)
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
        form = forms[wrong.index(True)]
        advice += (
            " If you know these derivatives to be the ones you want, as those of a straight-through estimator, "
            f'give form="{form}" to FIPOptimizer or AnchorMetric: it is taken at its word.'
        )
    raise RuntimeError(
        f"model: no form of Jacobian-vector product is right for it. {seen} {advice}"
    )


@dataclass(frozen=True)
class _Difference:
    """A difference of the outputs along the line.

    Attributes:
        step: Half its width h.
        slope: What it makes of the derivative, shape ``(N, m)``.
        spread: How far that is from the derivative by curvature, kinks and rounding, as measured: the slope depends on
            the width, and its two sides differ. In Euclidean norm.
        rounding: How far it may be by the rounding that is known of.
        still: Whether no output moved at all.
    """

    step: float
    slope: Tensor
    spread: float
    rounding: float
    still: bool

    @property
    def allowance(self) -> float:
        """How far the slope may be from the derivative."""
        return self.spread + self.rounding


class _Probed:
    """A few anchors, two points in weight space and a line through the second. Inside :func:`evaluation`."""

    def __init__(self, anchors: AnchorBatch, params: Sequence[Tensor], seed: int) -> None:
        self._anchors = anchors
        self._names = parameter_names(anchors, params)
        self._weights = anchors.weights()
        # What an anchor's outputs are can depend on its chunk, so at most one chunk is looked at.
        number = min(ANCHORS, len(anchors), anchors.chunk_size or len(anchors))
        spread = [i * (len(anchors) - 1) // max(1, number - 1) for i in range(number)]
        self._few = anchors._select(torch.tensor(spread, device="cpu"))
        self._here = {name: self._weights.parameters[name] for name in self._names}
        z = self._checked_outputs()
        check_width(z, anchors.reference)
        generator = torch.Generator(device="cpu").manual_seed(seed)

        def random(like: Tensor) -> Tensor:
            drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu")
            return drawn.to(like)

        self._u = random(z)
        # A lookup of a padding row reads it but has no derivative by it, so all is compared along the others.
        padding = anchors.padding_rows()

        def offset(name: str, p: Tensor, scale: float) -> Tensor:
            drawn = scale * random(p)
            for row in padding.get(name, []):
                drawn[row] = 0.0
            return drawn

        scales = _scales(list(self._here.values()))
        self._near, self._z = self._nearby(
            [
                offset(name, p, scale if bool(p.any()) else 10 * scale)
                for (name, p), scale in zip(self._here.items(), scales, strict=True)
            ]
        )
        scales = _scales(list(self._near.values()))
        self._v = [
            offset(name, p, scale)
            for (name, p), scale in zip(self._near.items(), scales, strict=True)
        ]
        self._differences: list[_Difference] = []

    # --- the function -------------------------------------------------------------------------------------

    def _function(self, primals: Parameters) -> Tensor:
        parameters, buffers = self._weights
        return self._anchors.call(self._few, Weights(parameters | primals, buffers))

    def _outputs(self, primals: Parameters) -> Tensor:
        with torch.enable_grad():  # for a model that differentiates in its forward pass
            return self._function(primals).detach()

    def _checked_outputs(self) -> Tensor:
        torch.manual_seed(0)
        with _Precision() as precision:
            z = self._outputs(self._here)
        self._eps = max(precision.eps, torch.finfo(z.dtype).eps)
        torch.manual_seed(1)
        if not close(self._outputs(self._here), z, max(1e-4, self._eps)):
            raise ValueError(RANDOM)
        return z

    def _nearby(self, offsets: list[Tensor]) -> tuple[Parameters, Tensor]:
        """Weights beside today's and the outputs there."""
        for distance in DISTANCES:
            near = {
                name: p + distance * offset
                for (name, p), offset in zip(self._here.items(), offsets, strict=True)
            }
            before = {name: p.clone() for name, p in near.items()}
            try:
                z = self._outputs(near)
            except (RuntimeError, ValueError, ArithmeticError):
                if distance == 0:
                    raise
                continue
            written = [name for name, p in near.items() if not torch.equal(p, before[name])]
            if written:
                raise RuntimeError(
                    f"model: it writes to {_listed(written)} as it is evaluated, so to look at the function "
                    "changes it. Compute the changed weight without writing it, as "
                    "torch.nn.utils.parametrize does, or do it after each step."
                )
            if bool(torch.isfinite(z).all()) or distance == 0:
                break
        return near, z

    # --- the checks ---------------------------------------------------------------------------------------

    def fault(self, form: Form) -> str | None:
        """What is wrong with products of this form, or None."""
        for point in (self._here, self._near):
            chunk = _EagerChunk(self._function, point, form)
            jv, jtu = chunk.jvp(self._v), chunk.vjp(self._u)
            fault = self._not_adjoint(jv, [x.to_dense() for x in jtu])
            if fault is not None:
                return fault
        return self._not_the_slope(chunk, jv)

    def _not_adjoint(self, jv: Tensor, jtu: list[Tensor]) -> str | None:
        broken = [
            name
            for name, x in zip(self._names, jtu, strict=True)
            if not bool(torch.isfinite(x).all())
        ]
        if broken or not bool(torch.isfinite(jv).all()):
            of = f" by {_listed(broken)}" if broken else ""
            return f"its derivatives{of} are not finite"
        left, right = _dot([jv], [self._u]), _dot(self._v, jtu)
        size = max(_size([jv]) * _size([self._u]), _size(self._v) * _size(jtu))
        error = abs(left - right)
        double = self._eps <= torch.finfo(torch.float64).eps
        tolerance = 1e-8 if double else max(1e-3, 4 * self._eps)
        kind = torch.finfo(jv.dtype)
        # Numbers that are almost too small, or whose squares are, have fewer digits.
        smallest = max(kind.tiny / kind.eps, 1e-140) * _size([self._u])
        if error <= tolerance * size + smallest:
            return None
        return (
            f"the tangent and the backward pass disagree by {_percent(error / max(size, smallest))}: "
            f"<Jv, u> = {left:.6g} but <v, J^T u> = {right:.6g}, as if an operation or hook had a backward of its own"
        )

    def _not_the_slope(self, chunk: _EagerChunk, jv: Tensor) -> str | None:
        for difference in self._all_differences():
            scale = max(_size([jv]), _size([difference.slope]))
            if difference.allowance <= ERROR * scale and (
                _size([difference.slope - jv]) <= ERROR * scale
            ):
                return None
        found = sorted(self._all_differences(), key=lambda d: d.step)
        telling: list[_Difference] = []
        for difference in found:
            if difference.still:
                continue  # too small a step for the precision inside, which says no more
            scale = max(_size([jv]), _size([difference.slope]))
            if difference.spread > max(4 * difference.rounding, scale / 4):
                break  # what varies within so small a step is not resolved by longer ones
            telling.append(difference)
        if all(difference.still for difference in found):
            telling = found[-1:]
        if not telling:
            return None
        best = min(telling, key=lambda d: d.allowance)
        if not self._differs(jv, best):
            return None
        return self._verdict(chunk, jv, best)

    @staticmethod
    def _differs(jv: Tensor, difference: _Difference) -> bool:
        scale = max(_size([jv]), _size([difference.slope]))
        return _size([difference.slope - jv]) > 2 * difference.allowance + ERROR * scale

    # --- differences along the line -------------------------------------------------------------------------

    def _all_differences(self) -> Iterator[_Difference]:
        """The differences at each step, made as they are asked for and kept; none where outputs are not finite."""
        smallest = 100 * torch.finfo(self._z.dtype).eps
        for i, step in enumerate(h for h in STEPS if h >= smallest):
            if i == len(self._differences):
                self._differences.append(self._difference(step))
            if math.isfinite(self._differences[i].allowance):
                yield self._differences[i]

    def _difference(self, step: float, part: Sequence[bool] | None = None) -> _Difference:
        """The difference with ``step``, along those parameters only that are in ``part``."""
        moved = {h: self._outputs(self._moved(h, part)) for h in (-step, -step / 2, step / 2, step)}
        z = self._z.double()
        wide, narrow = (
            (moved[h].double() - moved[-h].double()) / (2 * h) for h in (step, step / 2)
        )
        bend = _size([moved[step].double() - 2 * z + moved[-step].double()])
        spread = max(_size([wide - narrow]), bend / (2 * step))
        rounding = self._eps * _size([z]) / step
        still = all(torch.equal(x, self._z) for x in moved.values())
        return _Difference(step, wide, spread, rounding, still)

    def _moved(self, h: float, part: Sequence[bool] | None) -> Parameters:
        part = part or [True] * len(self._v)
        return {
            name: p + h * v if moves else p
            for (name, p), v, moves in zip(self._near.items(), self._v, part, strict=True)
        }

    # --- what is said of an error -----------------------------------------------------------------------------

    def _verdict(self, chunk: _EagerChunk, jv: Tensor, best: _Difference) -> str:
        error = _size([best.slope - jv]) / max(_size([jv]), _size([best.slope]))
        columns = [
            k
            for k, (a, b) in enumerate(zip(jv.double().T, best.slope.T, strict=True))
            if _size([a - b]) > 0.1 * max(_size([a]), _size([b]))
        ]
        outputs = jv.shape[1]
        where = f"output {_few(columns)} of {outputs}"
        if len(columns) in (0, outputs):
            where = f"all {outputs} outputs"
        names, causes = self._concerned(chunk, best.step)
        by = f" by {_listed(names)}" if names else ""
        rounding = ""
        if self._eps > 1e-4:
            rounding = (
                " Part of the model is in half precision, whose rounding has been allowed for."
            )
        return (
            f"J v differs from a finite difference by {_percent(error)}, although it agrees with the backward pass: "
            f"the derivatives of {where}{by} are not those of what the model computes ({'; '.join(causes)})"
            f"{rounding}"
        )

    def _concerned(self, chunk: _EagerChunk, step: float) -> tuple[list[str], list[str]]:
        """The parameters whose derivatives differ, and what that looks like."""
        count = len(self._names)
        size = math.ceil(count / PARTS)
        names: list[str] = []
        causes: dict[str, None] = {}
        for start in range(0, count, size):
            part = [start <= i < start + size for i in range(count)]
            tangents = [
                v if moves else torch.zeros_like(v) for v, moves in zip(self._v, part, strict=True)
            ]
            jv, difference = chunk.jvp(tangents), self._difference(step, part)
            if not self._differs(jv, difference):
                continue
            names += self._names[start : start + size]
            causes[_likeness(jv.double(), difference.slope)] = None
        return names, list(causes) or ["too little to be seen in a single part of them"]


class _Precision(TorchDispatchMode):
    """Takes note of the coarsest rounding among the results of all operations within it, wherever they come from."""

    eps = 0.0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Carry out the operation."""
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.is_floating_point():
                self.eps = max(self.eps, torch.finfo(x.dtype).eps)
        return result


def _likeness(jv: Tensor, slope: Tensor) -> str:
    """What a wrong derivative looks like beside the slope."""
    if _size([jv]) <= 1e-6 * _size([slope]):
        return "autograd finds no dependence where there is one: detach, no_grad, reentrant checkpointing"
    if _size([slope]) <= 1e-6 * _size([jv]):
        return "autograd finds a dependence where there is none: rounding with a straight-through estimator"
    factor = _dot([jv], [slope]) / (_dot([jv], [jv]) or 1.0)
    if factor and _size([slope - factor * jv]) <= ERROR * _size([slope]):
        return (
            f"autograd's are {1 / factor:.3g} times the right ones: a hook or custom function that scales or "
            "reverses gradients"
        )
    return "part of the network is missing or another: detach, reentrant checkpointing, a backward of its own"


def _scales(tensors: Sequence[Tensor]) -> list[float]:
    """A typical size of each parameter's entries; of one that is zero, that of all."""
    count = sum(p.numel() for p in tensors)
    overall = _size(tensors) / math.sqrt(max(1, count)) or 1.0
    return [
        max(_size([p]) / math.sqrt(max(1, p.numel())), 1e-3 * overall) if bool(p.any()) else overall
        for p in tensors
    ]


def _size(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all entries."""
    norms = [float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in tensors]
    return math.sqrt(math.fsum(x * x for x in norms))


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return math.fsum(
        float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True)
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more parameters"


def _few(numbers: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"
