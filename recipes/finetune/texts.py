"""Short texts by kind: a folder with one file a kind, such as the folder of Debian's package ``fortunes``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes.common.data import DataError

Texts = Mapping[str, Sequence[str]]  # the texts of each kind

FORTUNES = Path("/usr/share/games/fortunes")
# The kinds of ``fortunes`` that are learnt by default: each has a subject or a style, and 500 texts or more.
FORTUNE_KINDS = (
    *("computers", "definitions", "men-women", "people", "platitudes"),
    *("politics", "science", "songs-poems", "work", "zippy"),
)
# Drawings, and the files that ``strfile`` makes of a text file.
SKIPPED_NAMES = frozenset({"ascii-art"})
SKIPPED_SUFFIXES = frozenset({".dat", ".u8"})
KINDS = 10  # the most kinds that are learnt if none are named

_SEPARATOR = re.compile(r"^%\s*$", re.MULTILINE)
_BLANK = re.compile(r"\n\s*\n")


def read_kinds(folder: Path) -> dict[str, list[str]]:
    """Reads every file of a folder as one kind of text; folders within are left out.

    Texts are separated by lines that hold only ``%``. A file without such lines has blank lines between texts, and a
    file without these has one text a line. White space within a text becomes single spaces. A text that stands twice,
    in one file or in two, is kept where it comes first, by the names of the files.

    Args:
        folder: The folder.

    Returns:
        The texts of each kind by the name of its file, without a suffix.

    Raises:
        DataError: If the folder cannot be read, two files have one name, or a file is not UTF-8.
    """
    if not folder.is_dir():
        raise DataError(_missing(folder))
    kinds: dict[str, list[str]] = {}
    seen: set[str] = set()
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.is_symlink() or file.name.startswith("."):
            continue
        if file.suffix in SKIPPED_SUFFIXES or file.name in SKIPPED_NAMES:
            continue
        if file.stem in kinds:
            raise DataError(f"argument --texts: two files in {folder} are named {file.stem}")
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"argument --texts: {file} cannot be read: {error}") from error
        kept = list[str]()
        for text in entries(content):
            if (key := text.casefold()) not in seen:
                seen.add(key)
                kept.append(text)
        if kept:
            kinds[file.stem] = kept
    return kinds


def entries(content: str) -> list[str]:
    """The texts of one file, in their order; see :func:`read_kinds`."""
    if _SEPARATOR.search(content):
        parts = _SEPARATOR.split(content)
    elif _BLANK.search(content.strip()):
        parts = _BLANK.split(content)
    else:
        parts = content.splitlines()
    texts = [" ".join(part.split()) for part in parts]
    return [text for text in texts if text]


def learnt_kinds(kinds: Texts, names: Sequence[str] | None, folder: Path) -> list[str]:
    """The names of the kinds that are learnt; the texts of all other kinds are those whose outputs are to stay.

    Args:
        kinds: All kinds.
        names: The names that were asked for. None takes :data:`FORTUNE_KINDS` from the folder of ``fortunes``, and from
            another one the kinds with the most texts: ten, but no more than half of all.
        folder: The folder, for the messages.

    Raises:
        DataError: If a name is unknown, or fewer than two kinds are learnt, or none is left.
    """
    if names is None and folder == FORTUNES:
        names = FORTUNE_KINDS
    if names is None:
        by_size = sorted(kinds, key=lambda name: (-len(kinds[name]), name))
        names = sorted(by_size[: min(KINDS, len(kinds) // 2)])
    for name in names:
        if name not in kinds:
            raise DataError(
                f"argument --kinds: {name!r} is no file in {folder}, which has {', '.join(kinds) or 'none'}"
            )
    if len(names) < 2 or len(names) == len(kinds):
        raise DataError(
            f"argument --kinds: {len(names)} of the {len(kinds)} kinds in {folder} would be learnt; it takes two at "
            "least, and one beside them whose outputs stay"
        )
    return list(names)


def _missing(folder: Path) -> str:
    if folder == FORTUNES:
        return (
            f"the texts of Debian's package fortunes are not in {folder}: install them with 'apt install fortunes', or "
            "name with --texts a folder of text files, one a kind"
        )
    return f"argument --texts: {folder} is no folder"
