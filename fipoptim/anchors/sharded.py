"""A network whose parameters ``fully_shard`` has divided among ranks, as a function: the model runs by its own hooks.

The hooks gather the parameters of one module at a time, so that no rank ever has all of them. Every evaluation is
therefore a collective: all ranks evaluate as often as each other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fipoptim.anchors.evaluation import unwrap
from fipoptim.anchors.inputs import Inputs, count_inputs, split_equally
from fipoptim.anchors.network_function import NetworkFunction, Weights
from fipoptim.anchors.output_space import OutputMap
from fipoptim.ranks import ALONE, Ranks
from fipoptim.shards import (
    fsdp_modules,
    is_fully_sharded,
    local,
    named_parameters,
    ranks_of_shards,
    reshard,
    space_of,
)
from fipoptim.solver.space import Space


def network_function(
    model: nn.Module, output: str | OutputMap, ranks: Ranks = ALONE
) -> NetworkFunction:
    """The function of a model, which may be fully sharded; see :class:`NetworkFunction`."""
    kind = ShardedFunction if is_fully_sharded(unwrap(model)) else NetworkFunction
    return kind(model, output, ranks)


class ShardedFunction(NetworkFunction):
    """The function of a fully sharded model. Its :class:`Weights` hold the part of each parameter that this rank has.

    Other weights are written into the model for the time of an evaluation, and those of before put back bit for bit,
    also if the evaluation raises.
    """

    _keeps_graph = False

    def divided(self, inputs: Inputs, most: int | None) -> list[Inputs]:
        """``inputs`` in as many parts as the other ranks have of theirs; see :meth:`NetworkFunction.divided`.

        If one rank has an anchor more than another, and ``most`` is 1, a part of it holds two.
        """
        count = count_inputs(inputs)
        more, fewer = ranks_of_shards(self._originals().values()).largest(count, -count)
        parts = math.ceil(more / most) if most else 1
        return split_equally(inputs, max(1, min(parts, int(-fewer))))

    def synchronize(self) -> None:
        """See :meth:`NetworkFunction.synchronize`."""
        reshard(self.model)
        super().synchronize()

    def space(self, names: Sequence[str]) -> Space:
        """The space of flat vectors over the parameters of these names."""
        params = self._originals()
        return space_of([params[name] for name in names])

    def padding_rows(self, inputs: Inputs) -> dict[str, list[int]]:
        """The padding rows of tables of embeddings, by the parameter's name, as their modules have them."""
        names = {id(p): name for name, p in self._originals().items()}
        rows: dict[str, set[int]] = {}
        for module in self.model.modules():
            table = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            if table and module.padding_idx is not None and id(module.weight) in names:
                rows.setdefault(names[id(module.weight)], set()).add(int(module.padding_idx))  # type: ignore[arg-type]
        return {name: sorted(found) for name, found in rows.items()}

    def differentiable(self, inputs: Inputs, weights: Weights) -> Tensor:
        """The outputs ``z`` ``(N, m)`` with their graph, for :meth:`gradients`; inside :meth:`evaluation`.

        Args:
            inputs: The inputs of this rank.
            weights: The weights of now, with their buffers.
        """
        self._keeps_graph = True
        try:
            with torch.enable_grad():
                return self.call(inputs, weights)
        finally:
            self._keeps_graph = False

    def gradients(self, z: Tensor, u: Tensor | None, names: Sequence[str]) -> list[Tensor]:
        """The gradient of ``z``, times ``u``, summed over ranks; every ``.grad`` stays as it is. The graph is freed.

        Args:
            z: What to differentiate.
            u: The cotangent of ``z``; None for a number.
            names: The parameters to differentiate by.

        Returns:
            For each name the part that this rank has.

        Raises:
            RuntimeError: If gradients are not synchronized.
        """
        params = self._originals()
        factors = self._divisors()
        kept = {name: p.grad for name, p in params.items()}
        try:
            for p in params.values():
                p.grad = None
            if z.requires_grad:
                torch.autograd.backward(z, u)
            reshard(self.model)
            found = {name: p.grad for name, p in params.items()}
        finally:
            for name, p in params.items():
                p.grad = kept[name]
        result = []
        for name in names:
            gradient = found[name]
            if gradient is None:
                result.append(torch.zeros_like(local(params[name])))
            else:
                result.append(local(gradient.detach()).mul_(factors[id(params[name])]))
        return result

    def _originals(self) -> dict[str, Tensor]:
        return named_parameters(self.model)

    def _divisors(self) -> dict[int, float]:
        """By what the hooks divide the sum of gradients over ranks, by the identity of the parameter.

        Raises:
            RuntimeError: If they do not sum.
        """
        factors: dict[int, float] = {}
        ranks = ranks_of_shards(self._originals().values())
        for module in fsdp_modules(self.model):
            group = module._get_fsdp_state()._fsdp_param_group
            if group is None:
                continue
            if not group.reduce_grads:
                raise RuntimeError(
                    "model: its gradients are not synchronized. Take steps and products only while "
                    "set_requires_gradient_sync(True) holds."
                )
            for each in group.fsdp_params:
                factors[id(each.sharded_param)] = group.gradient_divide_factor or float(ranks.size)
        return factors

    def _called(self, args: Any, kwargs: Mapping[str, Any], weights: Weights) -> Any:
        """See :meth:`NetworkFunction`."""
        with self._holding(weights), torch.set_grad_enabled(self._keeps_graph):
            result = self.model(*args, **kwargs)
            if not self._keeps_graph:
                reshard(self.model)
            return result

    @contextlib.contextmanager
    def _holding(self, weights: Weights) -> Iterator[None]:
        """The model with these weights."""
        own = {name: local(p) for name, p in self._originals().items()}
        # .data, so that versions do not count what is put back.
        moved = [
            (part.data, weights.parameters[name])
            for name, part in own.items()
            if part.data_ptr() != weights.parameters[name].data_ptr()
        ]
        before = [part.clone() for part, _ in moved]
        with self._with_buffers(weights.buffers):
            try:
                for part, value in moved:
                    part.copy_(value)
                yield
            finally:
                for (part, _), value in zip(moved, before, strict=True):
                    part.copy_(value)

    @contextlib.contextmanager
    def _with_buffers(self, buffers: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with other tensors as its buffers, which it may write to."""
        others = {id(b): buffers[name] for name, b in self.model.named_buffers()}
        replaced = [
            (module._buffers, name, b)
            for module in self.model.modules()
            for name, b in module._buffers.items()
            if b is not None
        ]
        try:
            for own, name, b in replaced:
                own[name] = others[id(b)]
            yield
        finally:
            for own, name, b in replaced:
                own[name] = b
