"""How much memory is alive at once: exact on every device, as it counts storages and not the allocator's pools."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the ``with`` block that are alive at the same time.

    What an operation uses for itself while it runs is not seen.

    Attributes:
        peak: The most bytes alive after an operation.
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
