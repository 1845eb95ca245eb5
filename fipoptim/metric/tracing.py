"""The making of a trace: announced if it takes long, and with the reason if there is none."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fipoptim.metric.graph_passes import NotTraceable
from fipoptim.metric.trace import Function, Traced

LOG = logging.getLogger("fipoptim")
# Seconds after which it is announced that a trace is being made.
PATIENCE = 2.0


def traced(
    name: str,
    function: Function,
    variables: Sequence[Tensor],
    constants: Sequence[Tensor],
    *,
    compile: bool,
) -> Traced:
    """Trace the derivative of a function; see :class:`Traced`.

    A model whose control flow depends on values may have another way for ``torch.compile``, as those of transformers
    have for attention masks. It is tried second.

    Args:
        name: The name of the model, for messages.
        function: Maps ``(variables, constants)`` to the outputs.
        variables: The tensors to differentiate by.
        constants: All other tensors that the function reads.
        compile: Compile the trace.

    Raises:
        NotTraceable: If there is no right trace.
    """

    def attempt() -> Traced:
        return Traced(function, variables, constants, compile=compile)

    with _announced(name):
        try:
            return attempt()
        except NotTraceable as first:
            try:
                return _as_if_compiling(attempt)
            except NotTraceable:
                raise first from None


def say_untraced(name: str, why: NotTraceable) -> None:
    """Say that products run the model, and why."""
    LOG.warning(
        "The derivative of %s cannot be traced, so each product runs the model, which takes about twice as long: %s",
        name,
        str(why).splitlines()[0],
    )


def _as_if_compiling(attempt: Callable[[], Traced]) -> Traced:
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        return attempt()
    finally:
        torch.compiler._is_compiling_flag = before


@contextlib.contextmanager
def _announced(name: str) -> Iterator[None]:
    """Log that a trace is being made if that takes longer than :data:`PATIENCE`, and then how long it took."""
    message = (
        "Tracing the derivative of %s, once for each shape of anchors; products are faster after that. "
        'Solver(products=0) takes no products, and form="finite-difference" takes them without a trace.'
    )
    timer = threading.Timer(PATIENCE, LOG.warning, (message, name))
    timer.daemon = True
    timer.start()
    began = time.perf_counter()
    try:
        yield
    finally:
        timer.cancel()
        seconds = time.perf_counter() - began
        if seconds > PATIENCE:
            LOG.warning("The trace of %s took %.1f s.", name, seconds)
