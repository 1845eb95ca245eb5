"""The reference outputs of all anchors: kept in full or half precision, or given by networks when wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fipoptim.anchors.bundle import pad_positions
from fipoptim.anchors.fingerprint import Fingerprint, fingerprint_of
from fipoptim.anchors.inputs import Inputs, count_inputs, select_inputs
from fipoptim.anchors.networks import ReferenceNetwork
from fipoptim.anchors.refusals import check_outputs
from fipoptim.anchors.sharded import ShardedFunction
from fipoptim.ranks import Ranks

Split = Callable[[Inputs], Iterable[Inputs]]
# How many anchors, spread over all of them, identify networks that are asked for outputs.
LOOKED_AT = 8


@dataclass(frozen=True, eq=False)
class References:
    """The reference of N anchors. It is never changed: another reference is another object.

    Attributes:
        outputs: The reference outputs ``(N, m)``, as they are kept; None if ``networks`` give them.
        like: A tensor ``(0, m)`` in the precision and on the device that outputs have.
        networks: The networks that give reference outputs, of augmented anchors or of all; else none.
        segments: The number of each anchor's network in ``networks``, shape ``(N,)``; 0 if there is none.
    """

    outputs: Tensor | None
    like: Tensor
    networks: list[ReferenceNetwork]
    segments: Tensor = field(repr=False)

    @property
    def width(self) -> int:
        """The number m of outputs an anchor."""
        return self.like.shape[1]

    def of(self, inputs: Inputs, rows: Tensor | slice, split: Split) -> Tensor:
        """The reference outputs of some anchors, in the precision of outputs, shape ``(n, m)``.

        Args:
            inputs: The inputs of these anchors.
            rows: Their numbers.
            split: Divides inputs into parts, which are evaluated at a time.
        """
        if self.outputs is None:
            return self.by_networks(inputs, self.segments[rows], split)
        rows = rows.to(self.outputs.device) if isinstance(rows, Tensor) else rows
        return self.outputs[rows].to(self.like.dtype)

    def by_networks(self, inputs: Inputs, segments: Tensor, split: Split) -> Tensor:
        """The outputs ``(n, m)`` of inputs by the network of each, whose numbers ``segments`` ``(n,)`` has."""
        numbers = segments.unique().tolist()
        if len(numbers) == 1:
            return check_outputs(self.networks[numbers[0]].outputs(split(inputs)))
        found = self.like.new_empty(count_inputs(inputs), self.width)
        for number in numbers:
            rows = (segments == number).nonzero().squeeze(1)
            part = self.networks[number].outputs(split(select_inputs(inputs, rows)))
            found[rows.to(found.device)] = check_outputs(part).to(found)
        return found

    def all(self, inputs: Inputs, split: Split) -> Tensor:
        """The reference outputs of all anchors, ``(N, m)``; the arguments are those of :meth:`of`."""
        if self.outputs is not None:
            return self.outputs.to(self.like.dtype)
        return torch.cat(list(self.parts(inputs, slice(0, len(self.segments)), split)))

    def parts(self, inputs: Inputs, rows: slice, split: Split) -> Iterator[Tensor]:
        """The reference outputs of some anchors in parts; one part if they are kept in the precision of outputs."""
        if self.outputs is not None and self.outputs.dtype == self.like.dtype:
            yield self.outputs[rows]
            return
        start = rows.start
        for chunk in split(inputs):
            rows = slice(start, start + count_inputs(chunk))
            yield self.of(chunk, rows, lambda x: [x])
            start = rows.stop

    def fingerprint(self, inputs: Inputs, split: Split) -> Fingerprint:
        """Numbers by which the reference is known again; the arguments are those of :meth:`of`."""
        if self.outputs is not None:
            return fingerprint_of(self.outputs)
        count = len(self.segments)
        number = min(LOOKED_AT, count)
        rows = torch.tensor(
            [i * (count - 1) // max(1, number - 1) for i in range(number)], device="cpu"
        )
        found = fingerprint_of(self.of(select_inputs(inputs, rows), rows, split))
        return (float(count), *found[1:])

    def of_all(self, ranks: Ranks, count: int) -> References:
        """The reference of all ``count`` anchors, of which this is the share of a rank."""
        if ranks.alone:
            return self
        outputs = None if self.outputs is None else ranks.gathered(self.outputs, count)
        return dataclasses.replace(self, outputs=outputs, segments=segments_of(count))

    def extended(
        self, outputs: Tensor | None, network: ReferenceNetwork | None, count: int
    ) -> References:
        """The same with further anchors.

        Args:
            outputs: Their outputs ``(count, m)``; None if ``network`` gives them.
            network: Their network; None if reference outputs come from none.
            count: Their number.

        Raises:
            ValueError: If the network is a fully sharded model.
        """
        kept = None
        if self.outputs is not None and outputs is not None:
            kept = torch.cat([self.outputs, outputs.to(self.outputs)])
        if network is not None and isinstance(network.function, ShardedFunction):
            raise ValueError(
                "inputs: a fully sharded model gives the reference of all anchors by one network, as its ranks "
                "evaluate together. Build a further AnchorBatch, or keep outputs (store='full', no augment)."
            )
        networks = self.networks if network is None else [*self.networks, network]
        segments = torch.cat([self.segments, segments_of(count, len(self.networks))])
        return References(kept, self.like, networks, segments)

    def lengthened(self, before: int, positions: int) -> References:
        """The same with outputs of more ``positions`` than there were ``before``, which are padded."""

        def longer(z: Tensor) -> Tensor:
            rows = z.reshape(len(z), before, z.shape[1] // before)
            return pad_positions(rows, positions).flatten(1)

        kept = None if self.outputs is None else longer(self.outputs)
        return dataclasses.replace(self, outputs=kept, like=longer(self.like))


def segments_of(count: int, number: int = 0) -> Tensor:
    """The number of the reference network of each of ``count`` anchors, which share one."""
    return torch.full((count,), number, dtype=torch.long, device="cpu")
