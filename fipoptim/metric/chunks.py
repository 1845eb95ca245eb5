"""The outputs of some anchors, linearized: products with their Jacobian and its transpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fipoptim.anchors.inputs import Inputs
from fipoptim.anchors.sharded import ShardedFunction
from fipoptim.metric.finite_difference import norm_of
from fipoptim.metric.point import Function, Parameters, Point
from fipoptim.metric.trace import Traced
from fipoptim.solver.space import WHOLE, Space

Form = Literal["forward", "double-vjp", "finite-difference"]
FORMS: tuple[Form, ...] = get_args(Form)


class EagerChunk:
    """Some anchors linearized by autograd while the model runs; the graph of the forward pass is kept.

    Args:
        function: The outputs ``(N, m)`` as a function of the parameters.
        parameters: The parameters at which it is linearized.
        form: How Jacobian-vector products are taken: by forward-mode AD, as the derivative of a pullback, or as a
            central difference. None if none will be asked for.
    """

    def __init__(self, function: Function, parameters: Parameters, form: Form | None) -> None:
        self._function = function
        self._parameters = parameters
        self._form = form
        # Aliases that autograd can differentiate by; nothing is copied.
        self._leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        with torch.enable_grad():
            self._z = function(self._leaves)
        self._double: Callable[[Sequence[Tensor]], Tensor] | None = None

    @property
    def outputs(self) -> Tensor:
        """The outputs ``z``, shape ``(N, m)``."""
        return self._z.detach()

    def vjp(self, u: Tensor) -> list[Tensor]:
        r""":math:`J^\top u` for ``u`` ``(N, m)``: a tensor in the shape of each parameter."""
        if not self._z.requires_grad:
            return [torch.zeros_like(p) for p in self._parameters.values()]
        return list(
            torch.autograd.grad(
                self._z, list(self._leaves.values()), u, retain_graph=True, materialize_grads=True
            )
        )

    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        """:math:`J v`, shape ``(N, m)``, for tangents in the shapes of the parameters."""
        if not self._z.requires_grad:
            return torch.zeros_like(self._z)
        if self._form == "double-vjp":
            with torch.enable_grad():
                self._double = self._double or _double_vjp(self._z, list(self._leaves.values()))
            return self._double(tangents).detach()
        by_name = dict(zip(self._parameters, tangents, strict=True))
        if self._form == "finite-difference":
            return central_difference(self._function, self._parameters, by_name)
        assert self._form == "forward", "no Jacobian-vector products were announced"
        return _forward_jvp(self._function, self._parameters, by_name)


class TracedChunk:
    """Some anchors linearized by a trace of the derivative; no product runs the model.

    Args:
        traced: The trace.
        variables: The parameters to differentiate by.
        constants: All other tensors that the outputs depend on.
        run: Linearizes the same anchors by running the model; called if the trace fails in a product.

    Raises:
        RuntimeError: If the trace fails for these values.
    """

    def __init__(
        self,
        traced: Traced,
        variables: list[Tensor],
        constants: list[Tensor],
        run: Callable[[], EagerChunk],
    ) -> None:
        self.traced = traced
        self._run = run
        with torch.no_grad():
            self.outputs, self._saved = traced.primal(variables, constants)

    def vjp(self, u: Tensor) -> list[Tensor]:
        """As :meth:`EagerChunk.vjp`."""
        try:
            with torch.no_grad():
                return self.traced.pullback(self._saved, u)
        except RuntimeError:
            return self._run().vjp(u)

    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        """As :meth:`EagerChunk.jvp`."""
        try:
            with torch.no_grad():
                return self.traced.tangent(self._saved, tangents)
        except RuntimeError:
            return self._run().jvp(tangents)


class ShardedChunk:
    """Some anchors of a fully sharded network; each product runs the model.

    Args:
        network: The network.
        point: The point at which it is linearized.
        inputs: The anchors of this rank. Every product is a collective over anchors of all ranks.
        keep: Keep the graph of the outputs for the first pullback, which then runs backward alone.
    """

    def __init__(
        self, network: ShardedFunction, point: Point, inputs: Inputs, *, keep: bool
    ) -> None:
        self._network, self._point, self._inputs = network, point, inputs
        self._z = network.differentiable(inputs, point.weights) if keep else None
        self.outputs = point.outputs(inputs) if self._z is None else self._z.detach()

    def vjp(self, u: Tensor) -> list[Tensor]:
        r""":math:`J^\top u` of all ranks together, for ``u`` ``(N, m)`` of this one: this rank's parts of it."""
        z, self._z = self._z, None
        if z is None:
            z = self._network.differentiable(self._inputs, self._point.weights)
        return self._network.gradients(z, u, self._point.names)

    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        """:math:`J v`, shape ``(N, m)``, for this rank's parts of the tangents."""
        point = self._point
        return central_difference(
            point.function_on(self._inputs),
            point.parameters,
            dict(zip(point.names, tangents, strict=True)),
            self._network.space(point.names),
        )


Chunk = EagerChunk | TracedChunk | ShardedChunk


def central_difference(
    function: Function, parameters: Parameters, tangents: Parameters, space: Space = WHOLE
) -> Tensor:
    r""":math:`J v` as :math:`(z(w + hv) - z(w - hv)) / 2h`, from two forward passes.

    With :math:`h \|v\| = \sqrt[3]{u} \|w\|`, where ``u`` is the rounding of the coarsest parameter, the errors by
    rounding and by curvature are about alike, and the relative error about :math:`u^{2/3}`: 2e-5 in float32. A kink
    between the two networks, as ReLU has, adds an error of its own.
    """
    size, length = (
        space.length(norm_of(list(vectors.values()))) for vectors in (parameters, tangents)
    )
    rounding = max(torch.finfo(p.dtype).eps for p in parameters.values())
    step = rounding ** (1 / 3) * (size or 1.0) / (length or 1.0)
    # A model that differentiates by itself needs gradients enabled; no tensor here requires one.
    with torch.enable_grad():
        ahead, behind = (
            function({name: p + h * tangents[name] for name, p in parameters.items()}).detach()
            for h in (step, -step)
        )
    return (ahead - behind).div_(2 * step)


def _forward_jvp(function: Function, parameters: Parameters, tangents: Parameters) -> Tensor:
    """J v by forward-mode AD.

    torch.func.jvp is not used, because a model cannot differentiate by itself inside it. Such a model also needs
    gradients enabled.
    """
    with forward_ad.dual_level(), torch.enable_grad():
        duals = {name: forward_ad.make_dual(p, tangents[name]) for name, p in parameters.items()}
        z, tangent = forward_ad.unpack_dual(function(duals))
        return torch.zeros_like(z).detach() if tangent is None else tangent.detach()


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
