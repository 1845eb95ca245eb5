"""The batches of a loader, one after the other without end."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class EndlessBatches:
    """Gives the batches of a loader in turn, and starts the loader again when it is exhausted.

    A deep copy or a pickle continues with the batch that was next. It starts the loader anew, with the random states
    that torch and the loader's own generators had when the current pass began, skips the batches that were used, and
    puts the random states back.

    Args:
        argument: The name of the loader in messages.
        loader: A DataLoader or any iterable of ``(x, y)`` pairs that can be iterated more than once.

    Raises:
        TypeError: If ``loader`` is not iterable.
    """

    def __init__(self, argument: str, loader: Iterable[Any]) -> None:
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise TypeError(
                f"{argument}: must be a DataLoader or another iterable of (x, y) pairs, "
                f"got {type(loader).__name__}."
            )
        self._argument = argument
        self._loader = loader
        self._iterator: Iterator[Any] | None = None
        self._used = 0  # The number of batches taken from the current pass.
        self._states_at_start: list[Tensor] = []  # The states of self._generators() then.

    def next_pair(self, device: torch.device) -> tuple[Any, Any]:
        """The next ``(x, y)``, with the tensors on ``device``.

        A mapping in it comes as a dict, and a list as a tuple.

        Raises:
            TypeError: If the batch is not a pair.
            ValueError: If the loader yields nothing.
        """
        batch = self._next_batch()
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            size = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise TypeError(
                f"{self._argument}: must yield (x, y) pairs, got a {type(batch).__name__}{size}. "
                "For batches of another form write the loss as a function of your own."
            )
        x, y = (_moved(part, device) for part in batch)
        return x, y

    def __getstate__(self) -> dict[str, Any]:
        # The iterators of a DataLoader can be neither copied nor pickled.
        return self.__dict__ | {"_iterator": None}

    def _next_batch(self) -> Any:
        if self._iterator is None:
            # A copy of an object that was in the middle of a pass has used batches and no iterator.
            self._iterator = self._resumed_pass() if self._used else self._new_pass()
        for batch in self._iterator:
            self._used += 1
            return batch
        self._used = 0
        self._iterator = self._new_pass()
        for batch in self._iterator:
            self._used += 1
            return batch
        self._iterator = None
        raise ValueError(
            f"{self._argument}: yields no batch. Give a DataLoader or a list with at least one; "
            "a generator can be used up only once."
        )

    def _new_pass(self) -> Iterator[Any]:
        self._states_at_start = [generator.get_state() for generator in self._generators()]
        return iter(self._loader)

    def _resumed_pass(self) -> Iterator[Any]:
        """The current pass from the start, after the batches that were used."""
        if isinstance(self._loader, Iterator):
            return self._loader  # The copy of an iterator continues where the iterator was.
        generators = self._generators()
        states_now = [generator.get_state() for generator in generators]
        try:
            for generator, state in zip(generators, self._states_at_start, strict=True):
                generator.set_state(state)
            iterator = iter(self._loader)
            for _ in itertools.islice(iterator, self._used):
                pass
        finally:
            for generator, state in zip(generators, states_now, strict=True):
                generator.set_state(state)
        return iterator

    def _generators(self) -> list[torch.Generator]:
        """The generators that the loader may shuffle with: torch's own, and those of the loader and its samplers."""
        sampler = getattr(self._loader, "sampler", None)
        batch_sampler = getattr(self._loader, "batch_sampler", None)
        owners = (self._loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
        given = [getattr(owner, "generator", None) for owner in owners]
        own = {id(g): g for g in given if isinstance(g, torch.Generator)}
        return [torch.default_generator, *own.values()]


def _moved(part: Any, device: torch.device) -> Any:
    """``part`` of a batch with its tensors on ``device``."""
    if isinstance(part, Tensor):
        # A copy to the CPU must block: it could be read before it is complete.
        return part.to(device, non_blocking=device.type == "cuda")
    if isinstance(part, Mapping):
        return {name: _moved(value, device) for name, value in part.items()}
    if isinstance(part, (tuple, list)):
        return tuple(_moved(value, device) for value in part)
    return part
