"""The form of products over some parameters of one model: as given, or probed when the first product is taken."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.sharded import ShardedFunction
from fipoptim.metric.chunks import Form
from fipoptim.metric.parameters import parameter_names
from fipoptim.metric.probe import check_form, probe


class Forms:
    """Finds how products are taken, and remembers it.

    Args:
        anchors: The anchors.
        given: The form of all products, which is not probed; None probes.
        compile: Whether traces are to be compiled.

    Raises:
        ValueError: If the model is fully sharded and has no such form, or no trace.
    """

    def __init__(self, anchors: AnchorBatch, given: Form | None, *, compile: bool = False) -> None:
        check_form(anchors, given, compile=compile)
        self._anchors, self._given = anchors, given
        self._found: dict[
            frozenset[str], Form
        ] = {}  # by the names of the parameters that were probed together

    def of(self, params: Sequence[Tensor], among: Sequence[Tensor] = ()) -> Form:
        """The form of products over some parameters.

        A form that is right for parameters is right for some of them, as the others then do not move.

        Args:
            params: The parameters.
            among: Further parameters that are probed with them, so that no second probe is needed once they move.

        Raises:
            ValueError, RuntimeError: As :func:`probe`.
        """
        if self._given is not None and not isinstance(self._anchors.function, ShardedFunction):
            return self._given
        names = frozenset(parameter_names(self._anchors.model, params))
        for probed, form in self._found.items():
            if names <= probed:
                return form
        together = list(dict.fromkeys([*among, *params]))
        form = probe(self._anchors, together)
        self._found[frozenset(parameter_names(self._anchors.model, together))] = form
        return form

    def later(self, params: Sequence[Tensor], among: Sequence[Tensor] = ()) -> Callable[[], Form]:
        """:meth:`of`, to be asked when the first product is taken."""
        return functools.partial(self.of, list(params), list(among))
