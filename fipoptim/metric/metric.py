r"""The metric :math:`g = \frac1N \sum_i J_i^\top J_i` of weight space: products with J, J^T and g; its spectrum.

``g`` is never formed. One product ``g v`` is a Jacobian-vector product followed by a vector-Jacobian product
over the anchors.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fipoptim.anchors.batch import (
    AnchorBatch,
    Inputs,
    Sample,
    Weights,
    check_width,
    count_inputs,
    evaluation,
    map_inputs,
    named_tensors,
    split_inputs,
)
from fipoptim.mean import AnchorMean
from fipoptim.metric.behaviour import behaviour_of, random_state, refuse_random
from fipoptim.metric.trace import NotTraceable, Traced, close
from fipoptim.solver.eigenvalues import largest_eigenvalues

Form = Literal["forward", "double-vjp"]
Parameters = dict[str, Tensor]
Function = Callable[[Parameters], Tensor]

# On a CPU the anchors are linearized in blocks, whose intermediate results then stay in the cache: small ones of
# feature maps, and else larger ones, the larger the more weights each block reads and gradients it adds to.
CONVOLUTION_BLOCK, BLOCK, WEIGHTS_AN_ANCHOR = 128, 512, 50_000


@dataclass
class _Traces:
    """The traced derivatives of one model on one set of anchors.

    Attributes:
        by_shape: The traces by the shape of all they read; None where there is none that is right.
        behaviours: What the model's modules said of themselves when each trace was last compared with it.
    """

    by_shape: dict[Hashable, Traced | None] = field(default_factory=dict)
    behaviours: dict[Traced, Hashable] = field(default_factory=dict)

    def forget(self) -> None:
        """Start over."""
        self.by_shape.clear()
        self.behaviours.clear()


# Beside the anchors rather than in them, as a trace can be neither copied nor pickled.
_TRACES: WeakKeyDictionary[AnchorBatch, _Traces] = WeakKeyDictionary()


# --- the two ways to a Jacobian-vector product ---------------------------------------------------------


def _forward_jvp(function: Function, primals: Parameters, tangents: Parameters) -> Tensor:
    """J v by forward-mode AD.

    Not by torch.func.jvp, in which a model cannot differentiate by itself; and with gradients enabled for such a model.
    """
    with forward_ad.dual_level(), torch.enable_grad():
        duals = {name: forward_ad.make_dual(p, tangents[name]) for name, p in primals.items()}
        z, tangent = forward_ad.unpack_dual(function(duals))
        return torch.zeros_like(z).detach() if tangent is None else tangent.detach()


def _leaves(primals: Parameters) -> Parameters:
    """Aliases of the parameters that autograd can differentiate with respect to; nothing is copied."""
    return {name: p.detach().requires_grad_() for name, p in primals.items()}


def _double_vjp(z: Tensor, leaves: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
    """J v as the derivative of u -> J^T u, which is linear in u (Townsend's trick)."""
    u = torch.zeros_like(z, requires_grad=True)
    pulled = torch.autograd.grad(z, leaves, u, create_graph=True, materialize_grads=True)
    linked = [i for i, x in enumerate(pulled) if x.requires_grad]

    def jvp(tangents: Sequence[Tensor]) -> Tensor:
        if not linked:
            return torch.zeros_like(z)
        (result,) = torch.autograd.grad(
            [pulled[i] for i in linked],
            u,
            [tangents[i] for i in linked],
            retain_graph=True,
            materialize_grads=True,
        )
        return result

    return jvp


class _EagerChunk:
    """The outputs of some anchors linearized at the weights of now, by autograd as the model runs."""

    def __init__(self, function: Function, primals: Parameters, form: Form) -> None:
        self._function = function
        self._primals = primals
        self._form = form
        self._leaves = _leaves(primals)
        with torch.enable_grad():
            self._z = function(self._leaves)
        self._double: Callable[[Sequence[Tensor]], Tensor] | None = None

    @property
    def outputs(self) -> Tensor:
        return self._z.detach()

    def vjp(self, u: Tensor) -> list[Tensor]:
        if not self._z.requires_grad:
            return [torch.zeros_like(p) for p in self._primals.values()]
        return list(
            torch.autograd.grad(
                self._z, list(self._leaves.values()), u, retain_graph=True, materialize_grads=True
            )
        )

    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        if not self._z.requires_grad:
            return torch.zeros_like(self._z)
        if self._form == "double-vjp":
            with torch.enable_grad():
                self._double = self._double or _double_vjp(self._z, list(self._leaves.values()))
            return self._double(tangents).detach()
        by_name = dict(zip(self._primals, tangents, strict=True))
        return _forward_jvp(self._function, self._primals, by_name)


class _TracedChunk:
    """The same from the trace of the derivative: no product runs the model.

    Args:
        traced: The trace.
        moving: The parameters.
        fixed: All else that the outputs depend on.
        run: Linearizes the same anchors as the model runs, for a trace that fails.
    """

    def __init__(
        self,
        traced: Traced,
        moving: list[Tensor],
        fixed: list[Tensor],
        run: Callable[[], _EagerChunk],
    ) -> None:
        self.traced = traced
        self._run = run
        with torch.no_grad():
            self.outputs, self._saved = traced.primal(moving, fixed)

    def vjp(self, u: Tensor) -> list[Tensor]:
        try:
            with torch.no_grad():
                return self.traced.pullback(self._saved, u)
        except RuntimeError:
            return self._run().vjp(u)

    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        try:
            with torch.no_grad():
                return self.traced.tangent(self._saved, tangents)
        except RuntimeError:
            return self._run().jvp(tangents)


_Chunk = _EagerChunk | _TracedChunk


# --- which parameters ------------------------------------------------------------------------------------


def parameter_names(anchors: AnchorBatch, params: Iterable[Tensor]) -> list[str]:
    """The names in the anchors' model of ``params``, checked to be parameters a metric can be taken over.

    Raises:
        ValueError: If one is not the model's.
        TypeError: If one is complex, integer, sparse or of half precision.
    """
    names = {id(p): name for name, p in anchors.model.named_parameters()}
    found = []
    for i, p in enumerate(params):
        if id(p) not in names:
            raise ValueError(
                f"params: parameter {i} of shape {tuple(p.shape)} does not belong to the anchors' model "
                f"({type(anchors.model).__name__}). Build the AnchorBatch on the model that is optimized; if "
                "the model was replaced or moved since, build both anew."
            )
        check_parameter(names[id(p)], p)
        found.append(names[id(p)])
    return found


def check_parameter(name: str, p: Tensor) -> None:
    """Refuse a parameter over which no metric can be taken.

    Raises:
        TypeError: If ``p`` is complex, integer, sparse or of half precision.
    """
    if p.layout != torch.strided:
        raise TypeError(f"params: {name} is sparse ({p.layout}); fipoptim needs dense parameters.")
    if p.dtype not in (torch.float32, torch.float64):
        advice = (
            "keep the weights in float32 and use torch.autocast for the forward pass"
            if p.dtype in (torch.float16, torch.bfloat16)
            else "freeze it or leave it out"
        )
        raise TypeError(
            f"params: {name} has dtype {p.dtype}; the metric needs real float32 or float64: {advice}."
        )


class AnchorMetric:
    r"""The metric :math:`g = \frac1N \sum_i J_i^\top J_i` at the weights the model has now.

    Vectors are flat, of shape ``(n,)``, in the order of ``params``; outputs have shape ``(N, m)``. A metric
    belongs to the weights it was built at and says so when they have changed. With the anchors' ``chunk_size``
    smaller than their number every product evaluates the model again, chunk by chunk, and memory grows with
    the chunk; otherwise the forward pass is kept and products reuse it.

    Args:
        anchors: The anchors.
        params: The parameters, all of the model's; None takes those that require a gradient.
        sample: The anchors to use with their reference; None takes all, plain.
        form: ``"forward"`` (forward-mode AD) or ``"double-vjp"``; None probes which one is right.
        trace: Trace the forward form once for each shape of anchors, which takes tenths of a second for a small
            network and seconds for a deep one; products are then faster, and do not run the model. A model that
            cannot be traced is run.
        guard: Keep a copy of the parameters, to notice every change of them; without it, one that torch does not
            count, as through ``.data``, goes unnoticed.
        held: For each parameter a bool tensor of its shape, True at weights that do not move: they have no derivative.

    Attributes:
        names: The parameters' names in the model.
        form: How Jacobian-vector products are taken.
        outputs: Today's outputs ``z``, shape ``(N, m)``.
        traced: Whether products come from a trace of the derivative rather than from running the model.
        size: The number n of weights.
        held: The weights that do not move, as given.

    Raises:
        ValueError: If a parameter is not the model's, if there is none, or if the model is random in eval mode.
        TypeError: If a parameter is not a dense real float32 or float64 tensor.
        RuntimeError: If the outputs are not finite, or no form gives right products (with the cause).
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        anchors: AnchorBatch,
        params: Iterable[Tensor] | None = None,
        *,
        sample: Sample | None = None,
        form: Form | None = None,
        trace: bool = True,
        guard: bool = True,
        held: Sequence[Tensor] | None = None,
    ) -> None:
        model = anchors.model
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
        self.anchors = anchors
        self.params = list(params)
        if not self.params:
            raise ValueError("params: got none; give at least one parameter of the anchors' model.")
        self.names = parameter_names(anchors, self.params)
        if form is None:
            from fipoptim.metric.probe import probe  # which takes products itself

            form = probe(anchors, self.params)
        self.form: Form = form
        self.traced = trace and self.form == "forward"
        self.sample = sample or anchors.all()
        self.size = sum(p.numel() for p in self.params)
        self.held = held
        self._held = None if held is None else torch.cat([mask.reshape(-1) for mask in held])
        self._weights = anchors.weights()
        self._versions = self._weight_versions()
        self._copies = [p.detach().clone() for p in model.parameters()] if guard else None
        self._kept: list[_Chunk] | None = None
        with evaluation(model, anchors.device):
            self._linearize()
            if self._is_stale():
                self._traces.forget()
                anchors.route.found_stale()
                self._linearize()
        self.mean = AnchorMean(self.outputs.shape[0])
        check_width(self.outputs, self.sample.reference)
        if not bool(torch.isfinite(self.outputs).all()):
            raise RuntimeError(
                "model: its outputs on the anchors are not finite at today's weights; nothing was changed. "
                "Lower the learning rate or eps, or check the weights."
            )

    def __repr__(self) -> str:
        """One line: sizes and the form of the products."""
        rows, columns = self.outputs.shape
        return f"AnchorMetric(n={self.size}, anchors={rows}, outputs={columns}, form={self.form!r})"

    def residual(self) -> Tensor:
        """Today's distance of the outputs from the reference, :math:`r = z - z_{ref}`, shape ``(N, m)``."""
        return self.outputs - self.sample.reference.to(self.outputs.device)

    # --- flat vectors ---------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def unflatten(self, v: Tensor) -> list[Tensor]:
        """The flat vector ``v`` ``(n,)`` in the shapes and precisions of the parameters; views where those agree."""
        self.check_vector(v)
        if v.is_inference():
            v = v.clone()
        return [part.to(p) for part, p in zip(self.views(v), self.params, strict=True)]

    def check_vector(self, v: Tensor) -> None:
        """Refuse what is no flat vector.

        Raises:
            ValueError: If ``v`` does not have the shape ``(n,)``.
        """
        if v.shape != (self.size,):
            raise ValueError(
                f"v: must be a flat vector of shape ({self.size},), got {tuple(v.shape)}."
            )

    def flatten(self, parts: Iterable[Tensor]) -> Tensor:
        """Tensors in the shapes of the parameters as one flat vector ``(n,)``."""
        parts = list(parts)
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parts) else torch.float32
        device = self.params[0].device
        # An embedding may hand out sparse gradients.
        return torch.cat([p.detach().to_dense().reshape(-1).to(device, dtype) for p in parts])

    def views(self, v: Tensor) -> list[Tensor]:
        """Views of the flat vector ``v`` ``(n,)`` in the shapes of the parameters, and of its own precision."""
        parts = v.split([p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    @torch.inference_mode(False)
    def outputs_now(self) -> Tensor:
        """The outputs ``(N, m)`` at the weights the model has now, which may have moved since."""
        return self._outputs_at(self.anchors.weights())

    @torch.inference_mode(False)
    def outputs_after(self, v: Tensor) -> Tensor:
        """The outputs ``(N, m)`` that a step ``v`` ``(n,)`` would lead to; no weight is moved."""
        return self._outputs_at(self.weights_after(v))

    @torch.inference_mode(False)
    def weights_after(self, v: Tensor) -> Weights:
        """The network that a step ``v`` ``(n,)`` would lead to; no weight is moved."""
        weights = self.anchors.weights()
        moved = [
            # A sum may come out in the step's layout, in which a convolution can be much slower.
            total if total.stride() == p.stride() else torch.empty_like(p).copy_(total)
            for p, total in zip(
                self.params, torch._foreach_add(self.params, self.unflatten(v)), strict=True
            )
        ]
        parameters = {**weights.parameters, **dict(zip(self.names, moved, strict=True))}
        return weights._replace(parameters=parameters)

    def _outputs_at(self, weights: Weights) -> Tensor:
        with evaluation(self.anchors.model, self.anchors.device), torch.enable_grad():
            blocks = self.anchors.progress(self._blocks())
            parts = [self.anchors.call(self._prepared(x), weights).detach() for x in blocks]
            return torch.cat(parts)

    # --- products ---------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def jvp(self, v: Tensor) -> Tensor:
        """:math:`J v`: the first-order change of the outputs, shape ``(N, m)``, for ``v`` ``(n,)``."""
        tangents = self.unflatten(self.free(v))
        with self._evaluation():
            changes = []
            for chunk in self._linearizations():
                changes.append(chunk.jvp(tangents))
                del chunk
            return torch.cat(changes)

    @torch.inference_mode(False)
    def vjp(self, u: Tensor) -> Tensor:
        r""":math:`J^\top u`, shape ``(n,)``, for ``u`` of shape ``(N, m)``."""
        if u.shape != self.outputs.shape:
            raise ValueError(
                f"u: must have the outputs' shape {tuple(self.outputs.shape)}, got {tuple(u.shape)}."
            )
        start = 0
        total = _Sum(self)
        with self._evaluation():
            for chunk in self._linearizations():
                rows = chunk.outputs.shape[0]
                total.add(chunk.vjp(u[start : start + rows].to(chunk.outputs)))
                start += rows
                del chunk  # before the next one is made
        return self._freed_(total.vector)

    @torch.inference_mode(False)
    def matvec(self, v: Tensor) -> Tensor:
        """:math:`g v`, shape ``(n,)``."""
        tangents = self.unflatten(self.free(v))
        count = self.outputs.shape[0]
        total = _Sum(self)
        with self._evaluation():
            for chunk in self._linearizations():
                total.add(chunk.vjp(chunk.jvp(tangents) / count))
                del chunk
        return self._freed_(total.vector)

    def free(self, v: Tensor) -> Tensor:
        """``v`` ``(n,)`` without its part along weights that do not move."""
        self.check_vector(v)
        return v if self._held is None else v.masked_fill(self._held, 0.0)

    def _freed_(self, v: Tensor) -> Tensor:
        """The same in place."""
        return v if self._held is None else v.masked_fill_(self._held, 0.0)

    # --- the matrix, for small problems and for looking at it ---------------------------------------------

    def dense(self) -> Tensor:
        """The matrix ``g``, shape ``(n, n)``; for small problems, as it takes n products.

        Raises:
            ValueError: If the matrix would have more than 10^9 entries.
        """
        if self.size**2 > 10**9:
            raise ValueError(
                f"dense: the matrix of n = {self.size} weights does not fit; use matvec."
            )
        eye = torch.eye(self.size, dtype=self._dtype, device=self.params[0].device)
        g = torch.stack([self.matvec(column) for column in eye])
        return (g + g.T) / 2

    def diagonal(
        self, probes: int | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""The diagonal of ``g``, shape ``(n,)``: :math:`\frac1N \sum_{i,k} (\partial z_{ik}/\partial w_j)^2`.

        Args:
            probes: None is exact, from per-anchor gradients of each output: N m of them, vectorized over anchors. A
                number is an unbiased estimate from that many pullbacks, :math:`\frac1N (J^\top u)_j^2` for random
                signs ``u``, averaged: its standard deviation is about :math:`\sqrt{2/\text{probes}}` of the value.
            generator: Where the signs are drawn, on the CPU; None is torch's own.

        Raises:
            ValueError: If ``probes`` is not positive, or None where an anchor's outputs depend on the other anchors,
                as with batch norm that keeps no running statistics, or where the model cannot be vectorized, as an
                RNN.
        """
        if probes is not None:
            return self._estimated_diagonal(probes, generator)
        primals = self._primals()
        total = torch.zeros(self.size, dtype=self._dtype, device=self.params[0].device)
        count, outputs = self.outputs.shape
        at_once = max(1, min(self.anchors.chunk_size or count, 2**26 // self.size))

        def output(primals: Parameters, inputs: Inputs, k: int) -> Tensor:
            single = map_inputs(lambda x: x.unsqueeze(0), inputs)
            return self._function(single)(primals)[0, k]

        gradient = torch.func.vmap(torch.func.grad_and_value(output), in_dims=(None, 0, None))
        parts = split_inputs(self.sample.inputs, at_once)
        with self._evaluation():
            for part, z in zip(parts, self.outputs.split(at_once), strict=True):
                part = map_inputs(lambda x: x.to(self.anchors.device), part)
                for k in range(outputs):
                    try:
                        rows, alone = gradient(primals, part, k)
                    except RuntimeError as error:
                        raise ValueError(
                            "probes: None takes the gradients of all anchors at once by torch.func.vmap, which this "
                            f"model does not allow ({str(error).strip().splitlines()[0]}); give a number of probes, "
                            "for instance probes=100."
                        ) from error
                    if not close(alone, z[:, k], 1e-3):
                        raise ValueError(
                            "probes: None takes each anchor by itself, and the model's outputs for one depend on the "
                            "others (batch norm without running statistics?); give a number of probes."
                        )
                    total += self.flatten(rows[name].square().sum(dim=0) for name in self.names)
        return self._freed_(total / count)

    def _estimated_diagonal(self, probes: int, generator: torch.Generator | None) -> Tensor:
        if probes < 1:
            raise ValueError(f"probes: must be a positive number of pullbacks, got {probes!r}.")
        z = self.outputs
        total = torch.zeros(self.size, dtype=self._dtype, device=self.params[0].device)
        for _ in range(probes):
            signs = torch.randint(2, z.shape, generator=generator, device="cpu").mul_(2).sub_(1)
            row = self.vjp(signs.to(z.device, z.dtype))
            total.addcmul_(row, row)
        return total / (probes * len(z))

    def spectrum(self, k: int, *, tol: float = 1e-4, max_products: int | None = None) -> Tensor:
        """The ``k`` largest eigenvalues of ``g``, each as often as it occurs, descending, shape ``(k,)``, float64.

        Block Lanczos with re-orthogonalisation, until the residual of each is below ``tol`` times the largest. It
        starts from two random vectors, as one would not see an eigenvalue twice: a fifth more products than from one,
        as a rule. An eigenvalue that occurs m times takes m + 1 starts, and products in proportion; as under a linear
        head by itself, where each occurs once for each output.

        Raises:
            ValueError: If ``k`` is not between 1 and n.
            RuntimeError: If they have not converged within ``max_products`` (default: 50 (k + 1)).
        """
        if not 1 <= k <= self.size:
            raise ValueError(f"k: must be between 1 and n = {self.size}, got {k}.")
        limit = min(self.size, 50 * (k + 1) if max_products is None else max_products)
        like = torch.empty(self.size, dtype=self._dtype, device=self.params[0].device)
        values = largest_eigenvalues(self.matvec, like, k, tol=tol, max_products=limit)
        if values is None:
            raise RuntimeError(
                f"spectrum: {k} eigenvalues have not converged in {limit} products; raise max_products."
            )
        return values

    # --- inside -------------------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        double = any(p.dtype == torch.float64 for p in self.params)
        return torch.float64 if double else torch.float32

    def _primals(self) -> Parameters:
        return {name: self._weights.parameters[name] for name in self.names}

    def _function(self, inputs: Inputs) -> Function:
        # Not through self, which keeps what this function gives: a cycle would hold all that until it is found.
        anchors, weights = self.anchors, self._weights

        def function(primals: Parameters) -> Tensor:
            # Aliases of tied parameters are found by functional_call; the names given here are unique.
            return anchors.call(inputs, Weights(weights.parameters | primals, weights.buffers))

        return function

    def _linearize(self) -> None:
        """Take today's outputs; keep what the products need if all anchors are evaluated at once."""
        drawn = random_state(self.anchors.device)
        if (
            self.anchors.chunk_size is None
            or count_inputs(self.sample.inputs) <= self.anchors.chunk_size
        ):
            self._kept = None
            self._kept = list(self._fresh())
        outputs = []
        # For each trace the first block that it was used for and its outputs there, to be compared with the model.
        self._first_of: dict[Traced, tuple[Inputs, Tensor]] = {}
        for block, chunk in zip(self._blocks(), self._linearizations(), strict=True):
            outputs.append(chunk.outputs)
            if isinstance(chunk, _TracedChunk):
                self._first_of.setdefault(chunk.traced, (block, chunk.outputs))
            else:
                self.traced = False
            del chunk  # before the next one is made
        self.outputs = torch.cat(outputs)
        if random_state(self.anchors.device) != drawn:
            refuse_random(self.anchors, self.sample.inputs)

    def _linearized(self, inputs: Inputs) -> _Chunk:
        if self.traced:
            chunk = self._traced_chunk(inputs)
            if chunk is not None:
                return chunk
        return self._run(inputs)

    def _run(self, inputs: Inputs) -> _EagerChunk:
        return self._to_run(inputs)()

    def _to_run(self, inputs: Inputs) -> Callable[[], _EagerChunk]:
        # Without self: a chunk that the metric keeps holds it.
        return functools.partial(_EagerChunk, self._function(inputs), self._primals(), self.form)

    def _blocks(self) -> list[Inputs]:
        """The anchors in the parts that are linearized at a time."""
        inputs = self.sample.inputs
        size = min(count_inputs(inputs), self.anchors.chunk_size or count_inputs(inputs))
        if self.anchors.device.type == "cpu":
            wide = max(BLOCK, self.size // WEIGHTS_AN_ANCHOR)
            most = CONVOLUTION_BLOCK if self._convolutional() else wide
            # Anchors whose outputs depend on each other are one function in the chunks of drift(), and only there.
            if size > most and not self._mixing():
                size = math.ceil(size / math.ceil(size / most))  # in parts of the same size
        return split_inputs(inputs, size)

    def _convolutional(self) -> bool:
        return any(p.dim() > 2 for p in self._weights.parameters.values())

    def _linearizations(self) -> Iterable[_Chunk]:
        if self._kept is not None:
            return self._kept
        return self._fresh()

    def _fresh(self) -> Iterator[_Chunk]:
        return (self._linearized(block) for block in self.anchors.progress(self._blocks()))

    # --- the trace of the derivative ------------------------------------------------------------------------

    @property
    def _traces(self) -> _Traces:
        return _TRACES.setdefault(self.anchors, _Traces())

    def _traced_chunk(self, inputs: Inputs) -> _TracedChunk | None:
        """``inputs`` linearized by a trace, or None where there is none that can be trusted."""
        route, traces = self.anchors.route, self._traces
        if not route.traces or self._mixing():
            return None
        moving, fixed = list(self._primals().values()), self._fixed(inputs)
        shapes = tuple((x.shape, x.stride(), x.dtype, x.device) for x in (*moving, *fixed))
        key = (id(self.anchors.model), tuple(self.names), shapes)
        if key not in traces.by_shape:
            if not route.admits(_digest(self.names, shapes)):
                return None
            names, others = self.names, self._others()

            def function(moving: list[Tensor], fixed: list[Tensor]) -> Tensor:
                values = iter(fixed)
                weights = Weights(*({name: next(values) for name in part} for part in others))
                weights.parameters.update(zip(names, moving, strict=True))
                return self.anchors.call(map_inputs(lambda _: next(values), inputs), weights)

            try:
                traced = Traced(function, moving, fixed, compile=self.anchors.compile)
                traces.by_shape[key] = traced
                traces.behaviours[traced] = behaviour_of(self.anchors.model)
            except NotTraceable:
                if route.channels_last and self._prefers_channels_last():
                    route.channels_last = False
                    return self._traced_chunk(inputs)
                traces.by_shape[key] = None
        found = traces.by_shape[key]
        if found is None:
            return None
        try:
            return _TracedChunk(found, moving, fixed, self._to_run(inputs))
        except RuntimeError:  # it runs into what was another for the values it was traced with
            traces.by_shape[key] = None
            return None

    def _others(self) -> Weights:
        """Parameters that are not differentiated by, and buffers."""
        parameters, buffers = self._weights
        moving = set(self.names)
        return Weights({k: p for k, p in parameters.items() if k not in moving}, buffers)

    def _fixed(self, inputs: Inputs) -> list[Tensor]:
        """All that the outputs depend on, other than the parameters differentiated by."""
        others = [x for part in self._others() for x in part.values()]
        return others + list(named_tensors(self._prepared(inputs)).values())

    def _prepared(self, inputs: Inputs) -> Inputs:
        """``inputs`` where the model is, in the layout that it is traced for."""
        last = self.traced and self.anchors.route.channels_last and self._prefers_channels_last()

        def prepared(x: Tensor) -> Tensor:
            x = x.to(self.anchors.device, non_blocking=True)
            if last and x.dim() == 4 and x.is_floating_point():
                # With a single channel contiguous() sees no difference, but convolutions do.
                return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
            return x

        return map_inputs(prepared, inputs)

    def _prefers_channels_last(self) -> bool:
        return self.anchors.device.type == "cpu" and self._convolutional()

    def _is_stale(self) -> bool:
        """Whether the model is now another than the traces that were used: each is compared on two of its anchors."""
        if not self._first_of:
            return False
        behaviours, now = self._traces.behaviours, behaviour_of(self.anchors.model)
        for traced, (block, outputs) in self._first_of.items():
            if not self._agrees_with_the_first(outputs, block):
                return True
            # Outputs do not show that a part was detached.
            if behaviours[traced] != now and self._derivative_differs(block):
                return True
            behaviours[traced] = now
        return False

    def _derivative_differs(self, block: Inputs) -> bool:
        """Whether J v of the first two anchors is another than the trace's."""
        chunk = self._traced_chunk(block)
        if chunk is None:
            return False
        seeded = torch.Generator("cpu").manual_seed(0)
        tangents = [
            torch.randn(p.shape, generator=seeded, dtype=p.dtype, device="cpu").to(p)
            for p in self._primals().values()
        ]
        expected = self._run(map_inputs(lambda x: x[:2], block)).jvp(tangents)
        return not close(chunk.jvp(tangents)[: len(expected)], expected, 1e-3)

    def _mixing(self) -> bool:
        """Whether the outputs of an anchor depend on the others, as by batch norm that normalises by the batch."""
        route = self.anchors.route
        if route.mixing is None:
            first = self.anchors.chunks(self.sample.inputs)[0]
            if count_inputs(first) <= 2:
                return False  # as far as these tell
            with torch.enable_grad(), evaluation(self.anchors.model, self.anchors.device):
                z = self.anchors.call(first, self._weights).detach()
                route.mixing = not self._agrees_with_the_first(z, first)
        return bool(route.mixing)

    def _agrees_with_the_first(self, outputs: Tensor, inputs: Inputs) -> bool:
        """Whether the ``outputs`` of ``inputs`` begin as those of the model on the first two of these alone."""
        few = map_inputs(lambda x: x[:2], inputs)
        with torch.enable_grad():
            z = self.anchors.call(few, self._weights).detach()
        return close(outputs[: len(z)], z, 1e-4 if z.dtype == torch.float32 else 1e-9)

    def _weight_versions(self) -> list[int]:
        return [p._version for p in self.anchors.model.parameters()]

    def _evaluation(self) -> AbstractContextManager[None]:
        if self._weight_versions() != self._versions or not self._holds_its_weights():
            raise RuntimeError(
                "AnchorMetric: the weights have changed since this metric was built; build a new one."
            )
        return evaluation(self.anchors.model, self.anchors.device)

    def _holds_its_weights(self) -> bool:
        """Whether the parameters have the values they had; ``.data`` changes them behind torch's back."""
        if self._copies is None:
            return True
        now = [p.detach() for p in self.anchors.model.parameters()]
        return len(now) == len(self._copies) and all(
            p.shape == copy.shape
            and p.dtype == copy.dtype
            and p.device == copy.device
            and _same_values(p, copy)
            for p, copy in zip(now, self._copies, strict=True)
        )


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors hold the same numbers; others are not looked into, and NaN is another number."""
    return (
        a.layout != torch.strided
        or torch.equal(a, b)
        or bool((a.isnan() & b.isnan() | (a == b)).all())
    )


def _digest(names: Sequence[str], shapes: Sequence[tuple[Any, ...]]) -> str:
    """A short text that stands for a trace's shape, on any machine."""
    text = repr((list(names), [(tuple(s), st, str(d), dev.type) for s, st, d, dev in shapes]))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Sum:
    """Sums gradients over chunks into one flat vector, without a flat copy of each."""

    def __init__(self, metric: AnchorMetric) -> None:
        self._metric = metric
        self.vector = torch.empty(0, device="cpu")

    def add(self, parts: list[Tensor]) -> None:
        if self.vector.numel() == 0:
            self.vector = self._metric.flatten(parts)
            self._views = self._metric.views(self.vector)
        else:
            torch._foreach_add_(self._views, [p.to_dense() for p in parts])
