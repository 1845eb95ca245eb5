r"""The derivative of a function, traced once for all points: :math:`v \mapsto J v` and :math:`u \mapsto J^\top u`.

Without a trace every Jacobian-vector product evaluates the function again beside its tangents, and the trace of
torch.func.linearize holds the weights as constants, so it is of use for one step only. Here the function, its
forward-mode and its reverse-mode derivative are traced together, with weights and inputs as arguments, and the trace is
cut in three:

    primal(x)           everything that depends neither on v nor on u: the outputs z and what the other two need
    tangent(saved, v)   J v
    pullback(saved, u)  J^T u

A step then runs the primal once, and each product runs a tangent and a pullback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from fipoptim.metric.compare import close
from fipoptim.metric.graph_passes import (
    NotTraceable,
    check_traceable,
    drop_zeros,
    merge,
    write_in_place,
)

Function = Callable[[list[Tensor], list[Tensor]], Tensor]


class Traced:
    """The three parts of a traced function of ``variables`` and ``constants``, differentiated by the variables.

    Args:
        function: Maps ``(variables, constants)`` to the outputs ``z``.
        variables: The tensors to differentiate by. The trace depends on their shapes, dtypes and devices only.
        constants: All other tensors that the function reads.
        compile: Compile the parts with ``torch.compile``, when they are first run.

    Raises:
        NotTraceable: If the function depends on values in its control flow or in the shapes of its intermediate
            results, writes to its arguments or draws random numbers, or if the parts do not give the derivatives that
            the function gives.
    """

    def __init__(
        self,
        function: Function,
        variables: Sequence[Tensor],
        constants: Sequence[Tensor],
        *,
        compile: bool = False,
    ) -> None:
        variables, constants = list(variables), list(constants)
        seeded = torch.Generator("cpu").manual_seed(0)

        def random(like: Tensor) -> Tensor:
            drawn = torch.randn(like.shape, generator=seeded, dtype=like.dtype, device="cpu")
            return drawn.to(like.device)

        v = [random(p) for p in variables]
        joint = _joint(function)
        try:
            with torch.enable_grad():
                u = random(function(variables, constants).detach())
            module = make_fx(joint)(variables, constants, v, u)
            drop_zeros(module.graph)
            module.recompile()
            module = make_fx(torch.func.functionalize(module))(variables, constants, v, u)
            check_traceable(module.graph)
            merge(module.graph)
            self._cut(module, len(variables), len(constants))
            expected = joint(variables, constants, v, u)
            z, saved = self.primal(variables, constants)
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

    def _cut(self, module: fx.GraphModule, variables: int, constants: int) -> None:
        """Cut the graph into what reads no derivative, what reads tangents and what reads the cotangent."""
        graph = module.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        arguments = variables + constants
        primal, tangents = placeholders[:arguments], placeholders[arguments : arguments + variables]
        cotangent = placeholders[arguments + variables :]
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
            write_in_place(new)
            for node in new.nodes:
                node.meta.clear()
            return fx.GraphModule(module, new)

        self._primal: Callable[..., Any] = build("primal", primal, [z, *saved])
        self._tangent: Callable[..., Any] = build("tangent", needed["tangent"] + tangents, [jv])
        self._pullback: Callable[..., Any] = build(
            "pullback", needed["pullback"] + cotangent, gradients
        )

    def primal(
        self, variables: Sequence[Tensor], constants: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The outputs, and what the products at this point need."""
        z, *saved = self._primal(*variables, *constants)
        return z, saved

    def tangent(self, saved: list[Tensor], v: Sequence[Tensor]) -> Tensor:
        """:math:`J v`."""
        result: Tensor = self._tangent(*(saved[i] for i in self._reads["tangent"]), *v)[0]
        return result

    def pullback(self, saved: list[Tensor], u: Tensor) -> list[Tensor]:
        r""":math:`J^\top u`."""
        result: list[Tensor] = self._pullback(*(saved[i] for i in self._reads["pullback"]), u)
        return result


def _joint(function: Function) -> Callable[..., list[Tensor]]:
    """The outputs of ``function``, their tangent and their pullback as one function."""

    def joint(
        variables: list[Tensor], constants: list[Tensor], v: list[Tensor], u: Tensor
    ) -> list[Tensor]:
        # Both modes of autograd share one evaluation and so every intermediate result. The backward pass comes after
        # the tangents are gone, because torch takes slower formulas for it while they are there.
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in variables]
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(p, t) for p, t in zip(leaves, v, strict=True)]
                z, jv = forward_ad.unpack_dual(function(duals, constants))
                z, jv = z.clone(), jv.detach()
            gradients = torch.autograd.grad(z, leaves, u, materialize_grads=True)
        return [z.detach(), jv, *gradients]

    return joint
