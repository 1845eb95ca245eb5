"""Progress bars, and the function type by which long work moves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

# Called with the number of steps just taken and what is going on.
Progress = Callable[[int, str], None]


@contextmanager
def progress_bar(title: str, total: int, *, shown: bool) -> Iterator[Progress]:
    """Shows a bar of ``total`` steps; the ``with`` statement gives the function that moves it."""
    with tqdm(total=total, desc=title, unit="step", disable=not shown) as bar:

        def show(steps: int, text: str) -> None:
            bar.update(steps)
            bar.set_postfix_str(text, refresh=False)

        yield show
