"""The processes that share one set of anchors, and all that they tell each other.

No other file communicates. A process alone takes none of these ways: every method then returns what it was given.
"""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_T = TypeVar("_T")
# The largest relative difference of a number that every rank computes for itself: rounding on other processors.
TOLERANCE = 1e-6


class Ranks:
    """The ranks of a process group. Every method but :meth:`share` is a collective: all ranks have to call it.

    Args:
        group: The process group; None is this process alone.

    Attributes:
        rank: The number of this process in the group, from 0.
        size: The number of processes.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is not None and group.size() == 1:
            group = None  # a world of one is a process alone
        self._group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()

    @classmethod
    def of(cls, process_group: Any) -> Ranks:
        """The ranks that a user means.

        Args:
            process_group: A group; None is the default group if torch.distributed is initialized, else this process
                alone; False is this process alone.

        Raises:
            TypeError: If it is none of these.
            ValueError: If this process does not belong to the group.
        """
        if process_group is False:
            return ALONE
        if process_group is None:
            return cls(dist.group.WORLD) if is_initialized() else UNASKED
        if type(process_group) is int and process_group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "process_group: this process is no member of it; build anchors on its members."
            )
        if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
            what = type(process_group).__name__
            raise TypeError(
                f"process_group: must be a ProcessGroup, None (the default group) or False (this process alone), got "
                f"{what}. A DeviceMesh gives one by mesh.get_group()."
            )
        return cls(process_group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """The same: a copy of anchors shares them among the same processes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """What is unpickled belongs to the default group of the process that reads it, or is alone as this is."""
        return (Ranks.of, (False if self is ALONE else None,))

    def __repr__(self) -> str:
        """Which of how many."""
        return f"Ranks(rank={self.rank}, size={self.size})"

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self._group is None

    def same(self, others: Ranks) -> bool:
        """Whether these are the same processes."""
        if self._group is None or others._group is None:
            return self._group is others._group
        own, theirs = (dist.get_process_group_ranks(x) for x in (self._group, others._group))
        return bool(own == theirs)

    # --- how work is shared -------------------------------------------------------------------------------

    def share(self, count: int, rank: int | None = None) -> slice:
        """The rows, out of ``count``, that a rank evaluates: this one, or the given. Shares differ by one at most."""
        rank = self.rank if rank is None else rank
        return slice(rank * count // self.size, (rank + 1) * count // self.size)

    def gathered(self, part: Tensor, count: int) -> Tensor:
        """The rows ``(count, ...)`` of which each rank has its share."""
        if self.alone:
            return part
        shares = [self.share(count, rank) for rank in range(self.size)]
        sizes = [rows.stop - rows.start for rows in shares]
        padded = part.new_zeros(max(sizes), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self._group)
        return torch.cat([found[:size] for found, size in zip(parts, sizes, strict=True)])

    # --- sums -------------------------------------------------------------------------------------------

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place: the same bits on each."""
        if not self.alone:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def sums(self, *numbers: float) -> list[float]:
        """The sum of each number over ranks, in float64."""
        if self.alone:
            return list(numbers)
        found: list[float] = self.sum_(self._on_device(numbers)).tolist()
        return found

    def largest(self, *numbers: float) -> list[float]:
        """The largest of each number over ranks."""
        if self.alone:
            return list(numbers)
        found = self._on_device(numbers)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        largest: list[float] = found.tolist()
        return largest

    def every(self, holds: bool) -> bool:
        """Whether something holds on every rank."""
        return self.largest(0.0 if holds else 1.0)[0] == 0.0

    def any(self, holds: bool) -> bool:
        """Whether something holds on a rank."""
        return self.largest(1.0 if holds else 0.0)[0] == 1.0

    def agree(self, *numbers: float) -> bool:
        """Whether numbers are the same on every rank, up to rounding on other processors."""
        return not self.differing(*numbers)

    def differing(self, *numbers: float) -> set[int]:
        """Which of some numbers are not the same on every rank; all that are not finite count as the same."""
        if self.alone:
            return set()
        told = [float(math.isfinite(x)) for x in numbers]
        told += [x if math.isfinite(x) else 0.0 for x in numbers]
        both = self.largest(*told, *(-x for x in told))
        highs, lows = both[: len(told)], [-x for x in both[len(told) :]]
        return {
            k % len(numbers)
            for k, (high, low) in enumerate(zip(highs, lows, strict=True))
            if high - low > TOLERANCE * max(abs(high), abs(low))
        }

    # --- what rank 0 says ----------------------------------------------------------------------------------

    def first(self, value: _T) -> _T:
        """What rank 0 has; any object that can be pickled."""
        if self.alone:
            return value
        told = [value]
        dist.broadcast_object_list(told, group=self._group, group_src=0)
        return told[0]

    def done_by_first(self, action: Callable[[], _T]) -> _T:
        """What a call on rank 0 returns, on every rank; the others do not make it.

        Raises:
            Exception: On every rank, if the call raises. What cannot be pickled is a RuntimeError on the others.
        """
        if self.alone:
            return action()
        told: tuple[Any, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                told = (action(), None)
            except Exception as error:
                self.first((None, _sendable(error)))
                raise
        value, refusal = self.first(told)
        if refusal is not None:
            raise refusal
        return value  # type: ignore[no-any-return]

    def of_first(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Copies of the tensors that rank 0 has; those of one dtype travel together."""
        tensors = list(tensors)
        found: list[Tensor] = [t.clone() for t in tensors]
        if self.alone:
            return found
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            chosen = [k for k, t in enumerate(tensors) if t.dtype == dtype]
            sent = torch.cat([found[k].reshape(-1) for k in chosen])
            sent = sent.view(torch.uint8) if dtype == torch.bool else sent
            dist.broadcast(sent, group=self._group, group_src=0)
            sizes = [tensors[k].numel() for k in chosen]
            for k, part in zip(chosen, sent.view(dtype).split(sizes), strict=True):
                found[k] = part.view(tensors[k].shape)
        return found

    # --- errors ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Raise on every rank if one raises inside, where nothing may communicate; for construction, not for steps.

        Args:
            what: What is tried, for the message.

        Raises:
            RuntimeError: If another rank raised, with its error.
        """
        if self.alone:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        told = self._told(None if own is None else f"{type(own).__name__}: {own}")
        if own is not None:
            raise own
        for rank, message in enumerate(told):
            if message is not None:
                raise RuntimeError(f"{what}: rank {rank} raised {message}")

    def refuse_differing(self, values: Mapping[str, Any], advice: str) -> None:
        """Refuse values that are not the same on every rank.

        Args:
            values: What is to be the same, by name; objects that can be pickled and compared.
            advice: The end of the message.

        Raises:
            ValueError: On every rank, with the values of the first name that differs.
        """
        if self.alone:
            return
        told = self._told(dict(values))
        for name in values:
            found = [each.get(name) for each in told]
            if any(x != found[0] for x in found):
                shown = ", ".join(f"{x} on rank {rank}" for rank, x in enumerate(found[:4]))
                raise ValueError(f"{name}: differs between the ranks: {shown}. {advice}")

    def refuse_outgrown(self) -> None:
        """Refuse to go on alone among processes that were started later.

        Raises:
            RuntimeError: If there is a default group of several processes now, and there was none at the time.
        """
        if self is UNASKED and is_initialized():
            raise RuntimeError(
                "anchors: were built before torch.distributed was initialized, so each rank would do all of their work "
                "and nothing would keep the ranks together. Build the AnchorBatch after init_process_group() (or after "
                "the Accelerator or TrainingArguments), or give it process_group=False for a process by itself."
            )

    def check_device(self, device: torch.device) -> None:
        """Refuse tensors that the group cannot send.

        Raises:
            ValueError: If the group has no backend for this type of device.
        """
        if self._group is not None and device.type not in self._device_types():
            raise ValueError(
                f"process_group: has no backend for a model on {device.type!r}, as it was initialized with "
                f"{dist.get_backend(self._group)!r}. Move the model, or initialize with 'gloo' for CPUs and 'nccl' for "
                "GPUs; init_process_group() without a backend takes both."
            )

    # --- private ------------------------------------------------------------------------------------------

    def _device_types(self) -> list[str]:
        assert self._group is not None
        return [device.type for device in self._group._device_types]

    def _on_device(self, numbers: Sequence[float]) -> Tensor:
        kinds = self._device_types()
        device = "cpu" if "cpu" in kinds else kinds[0]
        return torch.tensor(numbers, dtype=torch.float64, device=device)

    def _told(self, value: Any) -> list[Any]:
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, value, group=self._group)
        return told


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def is_initialized() -> bool:
    """Whether torch.distributed has a default group of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


ALONE = Ranks(None)
UNASKED = Ranks(None)  # alone, as there was no group when it was looked for
