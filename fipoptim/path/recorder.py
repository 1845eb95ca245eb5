"""The recording of a path: after every k-th step of an optimizer its network is added to the path.

A network that cannot be recorded must not undo a step, and must not stop the run. It is missed: a warning says so, and
an error says so when the recording ends.
"""

from __future__ import annotations

import contextlib
import math
import reprlib
import warnings
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from fipoptim.path.networks import Networks
from fipoptim.ranks import ALONE, Ranks


class RecordedAnchors(Protocol):
    """The part of the anchors that a recording needs. ``drift()`` is called too if they have it."""

    @property
    def model(self) -> nn.Module:
        """The network that the optimizer moves."""


class RecordedOptimizer(Protocol):
    """The part of an optimizer that a recording needs. ``last_step.drift`` is read too if the optimizer has it."""

    @property
    def anchors(self) -> RecordedAnchors:
        """The anchors, which know the network."""

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """Have ``hook(optimizer, args, kwargs)`` called after every step, as ``torch.optim.Optimizer`` does."""


class Recorder:
    """Adds the network of an optimizer to a path after every ``every``-th step.

    Args:
        optimizer: The optimizer to follow.
        networks: The path that the networks are added to.
        every: The number of steps between two networks.
    """

    def __init__(self, optimizer: RecordedOptimizer, networks: Networks, every: int) -> None:
        self._optimizer: RecordedOptimizer | None = optimizer
        self._networks = networks
        self._every = every
        self._alone: bool = ranks_of(optimizer).alone
        self._hook: RemovableHandle | None = None
        self._step = 0
        self._missed: set[int] = set()
        self._first_failure: Exception | None = None

    @property
    def missed(self) -> list[int]:
        """The steps whose network should have been recorded and could not be."""
        return sorted(self._missed)

    def start(self) -> None:
        """Record the start network, and follow the optimizer from now on.

        Raises:
            RuntimeError: If it was called before.
            OSError: If the network cannot be written. It may be called again then.
        """
        if self._optimizer is None or self._hook is not None:
            raise RuntimeError(
                "this path is recorded already, or being recorded; call opt.record(...) for a new one."
            )
        anchors = self._optimizer.anchors
        drift = getattr(anchors, "drift", None)
        self._networks.begin(anchors.model, None if drift is None else _finite(drift()))
        self._hook = self._optimizer.register_step_post_hook(self._after_step)

    def finish(self, error: BaseException | None) -> None:
        """Record the last network, and leave the optimizer alone from now on.

        Args:
            error: The error that ends the recording, or None. A note on the missing networks is added to it. With
                several ranks the last network is then not recorded, as the others may not come to it.

        Raises:
            OSError: If networks are missing, there is no ``error``, and the first failure was an OSError.
            RuntimeError: If networks are missing, there is no ``error``, and the first failure was another one.
        """
        assert self._hook is not None
        self._hook.remove()
        try:
            if error is None or self._alone:
                self._record_the_last()
        finally:
            self._hook = self._optimizer = None
            self._networks.finish()
        shortfall = self._shortfall()
        if shortfall is None:
            return
        if error is not None:
            error.add_note(shortfall)
            return
        cause = self._first_failure
        if isinstance(cause, OSError):
            numbered = () if cause.errno is None else (cause.errno,)
            raise OSError(*numbered, shortfall) from cause
        raise RuntimeError(shortfall) from cause

    def _record_the_last(self) -> None:
        if self._networks.last_step != self._step:
            self._attempt(self._record)
        elif self._networks.unlisted:
            self._attempt(self._networks.write_index)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._step += 1
        if self._step % self._every == 0:
            failed_before = self._first_failure is not None
            error = self._attempt(self._record)
            if error is not None and not failed_before:
                self._warn(error)

    def _record(self) -> None:
        assert self._optimizer is not None
        info: Any = getattr(self._optimizer, "last_step", None)
        if hasattr(info, "measure"):
            info.measure()  # on every rank, if there are several
        drift = getattr(info, "drift", None)
        self._networks.add(self._optimizer.anchors.model, self._step, _finite(drift))

    def _attempt(self, write: Callable[[], None]) -> Exception | None:
        """Call ``write``, note whether the network of this step is missed, and return the error of ``write`` if any."""
        try:
            write()
        except Exception as error:
            # The frames of the error are dropped: they would keep the network that was not recorded in memory.
            error.__cause__ = error.__context__ = None
            self._first_failure = self._first_failure or error.with_traceback(None)
            return error
        finally:
            if self._networks.last_step == self._step:
                self._missed.discard(self._step)
            else:
                self._missed.add(self._step)
        if not self._missed:
            self._first_failure = None
        return None

    def _warn(self, error: Exception) -> None:
        # The warning must not become an error here, even under a filter that makes errors of warnings: the caller would
        # see a step that failed and weights that moved. The error is raised when the recording ends.
        with contextlib.suppress(RuntimeWarning):
            warnings.warn(
                f"path: the network of step {self._step} could not be recorded {self._networks.place} "
                f"({type(error).__name__}: {error}). The step is taken and the run goes on; the next networks are "
                "tried again without a further warning, and leaving the recording raises an error if any is missing.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _shortfall(self) -> str | None:
        """The networks that are missing, in words, or None if none is."""
        unlisted = self._networks.unlisted
        if not self._missed and not unlisted:
            return None
        parts = []
        if self._missed:
            parts.append(f"the networks of steps {reprlib.repr(self.missed)} could not be recorded")
        if unlisted:
            parts.append(f"the last {unlisted} networks could not be listed in the index")
        cause = self._first_failure
        because = "" if cause is None else f" ({type(cause).__name__}: {cause})"
        listed = len(self._networks) - unlisted
        return f"path: {' and '.join(parts)} {self._networks.place}{because}. The other {listed} are whole."


def ranks_of(optimizer: RecordedOptimizer) -> Ranks:
    """The ranks that record the path of an optimizer together: those that share its anchors."""
    ranks: Ranks = getattr(optimizer.anchors, "ranks", ALONE)
    return ranks


def _finite(drift: Any) -> float | None:
    """``drift`` as a float if it is finite and not negative, else None."""
    number = math.nan if drift is None else float(drift)
    return number if 0 <= number < math.inf else None
