"""What a process tells others: the calls of torch.distributed, and the bytes that it hands over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Where operations have the tensors that a rank hands over: the second argument of these, the first of others.
_SECOND = ("allgather", "_allgather", "reduce_scatter", "_reduce_scatter")


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        name: The operation, as "allreduce".
        numbers: How many numbers the rank hands over.
        bytes: Their bytes.
    """

    name: str
    numbers: int
    bytes: int


class Traffic(TorchDispatchMode):
    """Lists the calls inside the ``with`` block.

    Attributes:
        calls: The calls, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            given = args[1] if name.startswith(_SECOND) else args[0]
            tensors = [t for t in tree_iter(given) if isinstance(t, Tensor)]
            numbers, size = sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)
            self.calls.append(Call(name.strip("_"), numbers, size))
        return func(*args, **(kwargs or {}))

    def sums(self, least: int, below: float = math.inf) -> list[Call]:
        """The all-reduces of at least so many numbers, and of fewer than ``below``."""
        return [
            call
            for call in self.calls
            if call.name == "allreduce" and least <= call.numbers < below
        ]

    def numbers(self, name: str) -> int:
        """The numbers that this rank hands over in all calls of a name."""
        return sum(call.numbers for call in self.calls if call.name == name)
