"""Peak memory of tensors. The count is exact on every device: it counts tensors and not the pools of an allocator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that were made inside the ``with`` block and are still alive.

    Memory that an operation allocates and frees while it runs is not counted.

    Attributes:
        peak: The largest number of bytes alive after any operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {
            t.untyped_storage()._cdata
            for t in tree_iter((args, kwargs))
            if isinstance(t, Tensor) and t.layout == torch.strided
        }
        for t in tree_iter(result):
            if isinstance(t, Tensor) and t.layout == torch.strided:
                storage = t.untyped_storage()
                if storage._cdata not in before:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: x for key, x in self._alive.items() if not x[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result
