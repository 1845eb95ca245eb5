"""How far long work is: a bar, and the function that moves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

# Called with the number of steps just taken and what is going on.
Progress = Callable[[int, str], None]


@contextmanager
def progress_bar(title: str, total: int, *, shown: bool) -> Iterator[Progress]:
    """A bar of ``total`` steps; what it gives moves it."""
    with tqdm(total=total, desc=title, unit="step", disable=not shown) as bar:

        def show(steps: int, text: str) -> None:
            bar.update(steps)
            bar.set_postfix_str(text, refresh=False)

        yield show
