r"""The derivative of a function, traced once for all points: :math:`v \mapsto J v` and :math:`u \mapsto J^\top u`.

Eagerly, every Jacobian-vector product evaluates the function again beside its tangents, and torch.func.linearize
makes the weights constants of its trace, which is then of use for one step. Here the function, its forward-mode and
its reverse-mode derivative are traced together, with weights and inputs as arguments, and the trace is cut in three:

    primal(x)           everything that depends neither on v nor on u: the outputs z and what the other two need
    tangent(saved, v)   J v
    pullback(saved, u)  J^T u

so that a step runs the primal once and each product runs a tangent and a pullback, as the cheapest product does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten
Function = Callable[[list[Tensor], list[Tensor]], Tensor]

# Operations whose result owns fresh memory, and elementwise operations that may write over such a first argument.
_FRESH = {
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.addcmul_.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.convolution.default,
    aten.gather.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.mm.default,
    aten.mul.Tensor,
    aten.mul_.Tensor,
    aten.sub.Tensor,
    aten.sub_.Tensor,
    aten.threshold_backward.default,
    aten.threshold_backward.grad_input,
}
_IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
}
_VIEWS_OF_ZERO = {
    aten.alias.default,
    aten.detach.default,
    aten.expand.default,
    aten.permute.default,
    aten.reshape.default,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}


class NotTraceable(Exception):
    """The function's derivative has no trace that is right at every point; the message says why."""


class Traced:
    """The three parts of a traced function of ``moving`` and ``fixed`` tensors, differentiated by ``moving``.

    Args:
        function: Maps ``(moving, fixed)`` to the outputs ``z``.
        moving: The tensors to differentiate by; only shapes, dtypes and devices matter for what is traced.
        fixed: All other tensors that the function reads.
        compile: Compile the parts with ``torch.compile``, when they are first run.

    Raises:
        NotTraceable: If the function depends on values in its control flow or in the shapes of its intermediate
            results, writes to its arguments or draws random numbers, or if the parts do not give the derivatives that
            the function gives.
    """

    def __init__(
        self,
        function: Function,
        moving: Sequence[Tensor],
        fixed: Sequence[Tensor],
        *,
        compile: bool = False,
    ) -> None:
        moving, fixed = list(moving), list(fixed)
        seeded = torch.Generator("cpu").manual_seed(0)

        def random(like: Tensor) -> Tensor:
            drawn = torch.randn(like.shape, generator=seeded, dtype=like.dtype, device="cpu")
            return drawn.to(like.device)

        v = [random(p) for p in moving]

        def joint(
            moving: list[Tensor], fixed: list[Tensor], v: list[Tensor], u: Tensor
        ) -> list[Tensor]:
            # One evaluation under both modes of autograd, which then share every intermediate result. The backward
            # pass comes after the tangents are gone: with them, torch takes slower formulas for it.
            with torch.enable_grad():
                leaves = [p.detach().requires_grad_() for p in moving]
                with forward_ad.dual_level():
                    duals = [forward_ad.make_dual(p, t) for p, t in zip(leaves, v, strict=True)]
                    z, jv = forward_ad.unpack_dual(function(duals, fixed))
                    z, jv = z.clone(), jv.detach()
                gradients = torch.autograd.grad(z, leaves, u, materialize_grads=True)
            return [z.detach(), jv, *gradients]

        try:
            with torch.enable_grad():
                u = random(function(moving, fixed).detach())
            module = make_fx(joint)(moving, fixed, v, u)
            _drop_zeros(module.graph)
            module.recompile()
            module = make_fx(torch.func.functionalize(module))(moving, fixed, v, u)
            _check(module.graph)
            _merge(module.graph)
            self._cut(module, len(moving), len(fixed))
            expected = joint(moving, fixed, v, u)
            z, saved = self.primal(moving, fixed)
            found = [z, self.tangent(saved, v), *self.pullback(saved, u)]
        except NotTraceable:
            raise
        except Exception as error:
            raise NotTraceable(f"{type(error).__name__}: {error}") from error
        if not all(close(ours, theirs, 1e-3) for ours, theirs in zip(found, expected, strict=True)):
            raise NotTraceable("the trace gives other values than the function")
        if compile:
            for part in ("_primal", "_tangent", "_pullback"):
                compiled = torch.compile(getattr(self, part), fullgraph=True, dynamic=False)
                setattr(self, part, compiled)

    def _cut(self, module: fx.GraphModule, moving: int, fixed: int) -> None:
        """Cut the graph at what the tangents and the cotangent first touch."""
        graph = module.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        arguments = moving + fixed
        primal, tangents = placeholders[:arguments], placeholders[arguments : arguments + moving]
        cotangent = placeholders[arguments + moving :]
        part: dict[fx.Node, str] = dict.fromkeys(primal, "primal")
        part |= dict.fromkeys(tangents, "tangent") | dict.fromkeys(cotangent, "pullback")
        for node in graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            reads = {part[argument] for argument in node.all_input_nodes} - {"primal"}
            if len(reads) > 1:
                raise NotTraceable("tangents and cotangents meet")
            part[node] = reads.pop() if reads else "primal"
        (output,) = (node for node in graph.nodes if node.op == "output")
        z, jv, *gradients = output.args[0]
        needed: dict[str, list[fx.Node]] = {}
        for name in ("tangent", "pullback"):
            results = [jv] if name == "tangent" else gradients
            used = {a for n, p in part.items() if p == name for a in n.all_input_nodes}
            used |= {node for node in results if part[node] == "primal"}
            needed[name] = [n for n, p in part.items() if p == "primal" and n in used]
        saved = list(dict.fromkeys(needed["tangent"] + needed["pullback"]))
        position = {node: i for i, node in enumerate(saved)}
        self._reads = {name: [position[n] for n in nodes] for name, nodes in needed.items()}

        def build(name: str, inputs: list[fx.Node], results: list[fx.Node]) -> fx.GraphModule:
            new = fx.Graph()
            copies = {node: new.placeholder(node.name) for node in inputs}
            for node in graph.nodes:
                if part.get(node) == name and node not in copies:
                    copies[node] = new.node_copy(node, lambda n: copies[n])
            new.output([copies[node] for node in results])
            new.eliminate_dead_code()
            _write_in_place(new)
            for node in new.nodes:
                node.meta.clear()
            return fx.GraphModule(module, new)

        self._primal: Callable[..., Any] = build("primal", primal, [z, *saved])
        self._tangent: Callable[..., Any] = build("tangent", needed["tangent"] + tangents, [jv])
        self._pullback: Callable[..., Any] = build(
            "pullback", needed["pullback"] + cotangent, gradients
        )

    def primal(
        self, moving: Sequence[Tensor], fixed: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The outputs, and what the products at this point need."""
        z, *saved = self._primal(*moving, *fixed)
        return z, saved

    def tangent(self, saved: list[Tensor], v: Sequence[Tensor]) -> Tensor:
        """:math:`J v`."""
        result: Tensor = self._tangent(*(saved[i] for i in self._reads["tangent"]), *v)[0]
        return result

    def pullback(self, saved: list[Tensor], u: Tensor) -> list[Tensor]:
        r""":math:`J^\top u`."""
        result: list[Tensor] = self._pullback(*(saved[i] for i in self._reads["pullback"]), u)
        return result


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether ``a`` and ``b`` agree to ``tolerance``, relative to the largest entry of ``b``."""
    largest = float(b.abs().max()) if b.numel() else 0.0
    scale = largest if math.isfinite(largest) else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _check(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target._schema.is_mutable:
            raise NotTraceable(f"{node.target} writes to its argument")
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise NotTraceable(f"{node.target} draws random numbers")
        if _shape_depends_on_values(node):
            raise NotTraceable(f"the shape of what {node.target} gives depends on values")


_DEPENDS_ON_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def _shape_depends_on_values(node: fx.Node) -> bool:
    """Whether the result has another shape for other values, as that of ``nonzero``; a mask as index is one, too."""
    if node.target is aten.index.Tensor:
        indices: Any = node.args[1]
        values = [i.meta.get("val") for i in indices if isinstance(i, fx.Node)]
        return any(
            not isinstance(i, Tensor) or i.dtype in (torch.bool, torch.uint8) for i in values
        )
    operation: Any = node.target
    return not _DEPENDS_ON_VALUES.isdisjoint(operation.tags)


def _drop_zeros(graph: fx.Graph) -> None:
    """Drop what is computed from tangents that are zero, as those of inputs are.

    A zero that something writes to would be mistaken for one that stays; that the parts are compared with the
    function finds it.
    """
    zero: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.target is aten.view.default:
            node.target = aten.reshape.default  # what is dropped may have decided a layout
        if _is_zero(node, zero):
            zero.add(node)
        if node.target is aten.add.Tensor and not node.kwargs:
            a, b = node.args
            other = b if a in zero else a if b in zero else None
            if isinstance(other, fx.Node) and _same_dtype(other, node):
                with graph.inserting_before(node):
                    shape = list(node.meta["val"].shape)
                    same = graph.call_function(aten.expand.default, (other, shape))
                same.meta = dict(node.meta)
                node.replace_all_uses_with(same)
                graph.erase_node(node)
    graph.eliminate_dead_code()


def _merge(graph: fx.Graph) -> None:
    """Do once what is done twice, and leave out what does nothing; the graph writes to nothing."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("get_attr", "call_function"):
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        same = seen.get(key)
        if node.target in (aten.alias.default, aten.detach.default):
            same = node.args[0]
        elif node.target is aten.copy.default and _same_layout(node.args[1], node):
            same = node.args[1]
        if same is None:
            seen[key] = node
        else:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _key(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_key(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    # 1, 1.0 and True are equal, and not the same argument.
    return (type(value), value) if not isinstance(value, fx.Node) else value


def _is_zero(node: fx.Node, zero: set[fx.Node]) -> bool:
    if node.target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return True
    if node.target in _VIEWS_OF_ZERO:
        return node.args[0] in zero
    if node.target is aten.convolution.default:
        return node.args[0] in zero and node.args[2] is None
    if node.target in (aten.mm.default, aten.bmm.default, aten.mul.Tensor):
        return any(argument in zero for argument in node.args)
    return False


def _same_dtype(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    if not _same_dtype(a, b):
        return False
    x, y = a.meta["val"], b.meta["val"]
    return bool(x.shape == y.shape and x.stride() == y.stride())


def _write_in_place(graph: fx.Graph) -> None:
    """Let elementwise operations write over an argument that nobody else reads, rather than into new memory."""
    for node in graph.nodes:
        if node.target is aten.threshold_backward.default and _may_write(node, node.args[0]):
            node.target = aten.threshold_backward.grad_input
            node.kwargs = {"grad_input": node.args[0]}
        elif node.target in _IN_PLACE:
            first, other = node.args
            if not _may_write(node, first):
                first, other = other, first
                if node.target is aten.sub.Tensor or node.kwargs or not _may_write(node, first):
                    continue
            if (
                node.target is aten.add.Tensor
                and isinstance(other, fx.Node)
                and other.target is aten.mul.Tensor
                and len(other.users) == 1
                and not node.kwargs
                and all(isinstance(factor, fx.Node) for factor in other.args)
            ):
                node.target, node.args = aten.addcmul_.default, (first, *other.args)
                graph.erase_node(other)
            else:
                node.target, node.args = _IN_PLACE[node.target], (first, other)
    graph.lint()


def _may_write(node: fx.Node, argument: Any) -> bool:
    """Whether ``node`` is the only reader of ``argument``, which owns its memory and has the form of the result."""
    return (
        isinstance(argument, fx.Node)
        and argument.target in _FRESH
        and len(argument.users) == 1
        and node.args.count(argument) == 1
        and _same_layout(argument, node)
    )
