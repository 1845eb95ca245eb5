"""Files that are written whole or not at all, and files of unknown origin that are read without running their code."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from recipes.common.data import DataError

T = TypeVar("T")

# In indented JSON: a list or mapping that has none within.
_INNERMOST = re.compile(r"([\[{])\n([^\[\]{}]*)([\]}])")
_BREAK = re.compile(r"\n *")


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside ``path`` and renames it, so that an interrupted run leaves no half a file.

    Args:
        path: The file. Its folder is made if it is missing.
        write: Writes the content to the path that it gets.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all; each innermost list or mapping is on one line."""
    text = _INNERMOST.sub(_on_one_line, json.dumps(content, indent=2)) + "\n"
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns what :func:`write_json` wrote; None if there is no such file."""
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def read_untrusted(read: Callable[[], T], *, unsafe: str, unreadable: str) -> T:
    """Reads a file that anybody may have written and turns every failure into a :class:`DataError`.

    Args:
        read: Reads the file with a reader that loads tensors and plain values only.
        unsafe: The message if the file holds something else. torch's own message tells how to load such a file all the
            same, which would run code from it; so that message is not shown.
        unreadable: The message if the file cannot be read; ``{reason}`` in it becomes the first line of the error.

    Raises:
        DataError: With one of the two messages.
    """
    try:
        return read()
    except pickle.UnpicklingError as error:
        raise DataError(unsafe) from error
    except Exception as error:  # a damaged file may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(unreadable.replace("{reason}", reason)) from error


def _on_one_line(found: re.Match[str]) -> str:
    opening, inside, closing = found.groups()
    # JSON escapes the line breaks within strings, so only those of the layout are replaced.
    return f"{opening}{_BREAK.sub(' ', inside.strip())}{closing}"
