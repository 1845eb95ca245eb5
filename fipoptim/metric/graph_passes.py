"""Passes over the graph of a traced derivative: what it may hold, what it can leave out or write in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

# Operations whose result owns fresh memory.
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
# Elementwise operations, each with its form that writes over its first argument.
_IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
}
# Operations that give zero for an argument that is zero, because they only arrange its numbers anew.
_ARRANGING = {
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
_DEPENDS_ON_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class NotTraceable(Exception):
    """The function's derivative has no trace that is right at every point; the message says why."""


def check_traceable(graph: fx.Graph) -> None:
    """Refuse a graph that is not right at every point.

    Raises:
        NotTraceable: If an operation writes to its argument or draws random numbers, or if the shape of its result
            depends on values.
    """
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target._schema.is_mutable:
            raise NotTraceable(f"{node.target} writes to its argument")
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise NotTraceable(f"{node.target} draws random numbers")
        if _shape_depends_on_values(node):
            raise NotTraceable(f"the shape of the result of {node.target} depends on values")


def _shape_depends_on_values(node: fx.Node) -> bool:
    """Whether the result has another shape for other values, as that of ``nonzero`` or of an index by a mask."""
    if node.target is aten.index.Tensor:
        indices: Any = node.args[1]
        values = [i.meta.get("val") for i in indices if isinstance(i, fx.Node)]
        return any(
            not isinstance(i, Tensor) or i.dtype in (torch.bool, torch.uint8) for i in values
        )
    operation: Any = node.target
    return not _DEPENDS_ON_VALUES.isdisjoint(operation.tags)


def drop_zeros(graph: fx.Graph) -> None:
    """Drop what is computed from tangents that are zero, such as those of inputs.

    A zero that a later operation writes to is dropped by mistake. The comparison of the trace with the function, which
    follows, finds this.
    """
    zero: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.target is aten.view.default:
            # A dropped operation may have decided the layout on which view() relied.
            node.target = aten.reshape.default
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


def _is_zero(node: fx.Node, zero: set[fx.Node]) -> bool:
    """Whether the result is zero if the nodes in ``zero`` are."""
    if node.target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return True
    if node.target in _ARRANGING:
        return node.args[0] in zero
    if node.target is aten.convolution.default:
        return node.args[0] in zero and node.args[2] is None
    if node.target in (aten.mm.default, aten.bmm.default, aten.mul.Tensor):
        return any(argument in zero for argument in node.args)
    return False


def merge(graph: fx.Graph) -> None:
    """Do only once what the graph does twice, and leave out what does nothing. No node of the graph may write."""
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
    """A hashable value that is equal for equal arguments only."""
    if isinstance(value, (list, tuple)):
        return tuple(_key(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    # 1, 1.0 and True are equal in Python but are different arguments.
    return (type(value), value) if not isinstance(value, fx.Node) else value


def write_in_place(graph: fx.Graph) -> None:
    """Let elementwise operations write over an argument that nothing else reads, rather than into new memory."""
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


def _same_dtype(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    if not _same_dtype(a, b):
        return False
    x, y = a.meta["val"], b.meta["val"]
    return bool(x.shape == y.shape and x.stride() == y.stride())
