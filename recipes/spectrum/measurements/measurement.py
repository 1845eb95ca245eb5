"""The base of all measurements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from matplotlib.axes import Axes

from recipes.common import report
from recipes.common.progress import Progress
from recipes.spectrum.settings import SpectrumSettings
from recipes.spectrum.start import Start

Record = Mapping[str, Any]


class Measurement(ABC):
    """Something that is measured of the metric.

    A new one derives from this class and is registered in ``recipes.spectrum.measurements``.

    Attributes:
        title: What it is called in tables.
        option_kinds: The dataclasses of its own options (``recipes.common.settings.option``).
    """

    title: ClassVar[str]
    option_kinds: ClassVar[tuple[type, ...]] = ()

    @abstractmethod
    def units(self, start: Start, settings: SpectrumSettings) -> int:
        """How often :meth:`measure` moves the progress bar."""

    @abstractmethod
    def measure(
        self, start: Start, settings: SpectrumSettings, *, seed: int, progress: Progress
    ) -> dict[str, Any]:
        """Measures; the networks of the start are left as they are.

        Args:
            start: Networks, anchors and the new task.
            settings: The settings.
            seed: The seed of everything drawn.
            progress: Called after each part of the work.

        Returns:
            Plain values, as JSON has them.
        """

    @abstractmethod
    def table(self, records: Sequence[Record]) -> str:
        """The table of all seeds, one record each."""

    @abstractmethod
    def panels(self) -> Sequence[Callable[[Axes, Record], None]]:
        """What draws the record of one seed, one function for each part of the figure."""


def dimension(k: int) -> Callable[[Record], float | None]:
    """What reads the effective dimension at the damping number ``k`` from a spectrum."""

    def read(spectrum: Record) -> float | None:
        value: float | None = spectrum["dimensions"][k]["value"]
        return value

    return read


def cell(records: Sequence[Record], value: Callable[[Record], float | None], form: str) -> str:
    """The mean of a value over seeds as text, ± the standard deviation; a dash if it is not known for all."""
    values = [value(record) for record in records]
    known = [v for v in values if v is not None]
    return report.mean_and_deviation(known, form) if len(known) == len(values) else "–"
