"""The principal components of a path in weight space, and a plot of the path in their plane."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fipoptim.optional import import_for
from fipoptim.path.arguments import whole_number
from fipoptim.path.networks import Networks
from fipoptim.path.snapshot import difference, flat_numbers
from fipoptim.path.store import Piece

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The bytes of weights that are held at once: 8 for each network and coordinate, as float64.
PCA_BLOCK_BYTES = 128 * 2**20


def principal_components(networks: Networks, components: int) -> tuple[Tensor, Tensor]:
    """The principal components of the parameters; ``FIPPath.pca`` describes arguments, results and errors.

    They come from the n × n Gram matrix of the centred parameters, which is summed over blocks of coordinates.
    """
    n = len(networks)
    if n == 0:
        raise ValueError(
            "path: it holds no network yet; record one with ``with opt.record(...) as path:``."
        )
    count = whole_number(components)
    if count is None or count < 1:
        raise ValueError(f"components: must be a whole number, 1 or more, got {components!r}.")
    networks.check()
    gram = torch.zeros(n, n, dtype=torch.float64, device="cpu")
    for block in parameter_blocks(networks, max(1, PCA_BLOCK_BYTES // (8 * n))):
        block = difference(block, block[:1])
        block -= block.mean(0)
        gram.addmm_(block, block.T)
    if not bool(torch.isfinite(gram).all()):
        raise ValueError(
            "path: the networks are too far apart for the squares of their distances to be numbers."
        )
    values, vectors = torch.linalg.eigh(gram)
    found = min(count, n)
    values = values.flip(0)[:found].clamp(min=0)
    coordinates = vectors.flip(1)[:, :found] * values.sqrt()
    largest = coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True))
    coordinates = coordinates * torch.where(largest < 0, -1.0, 1.0)
    total = float(gram.trace())
    shares = values / total if total > 0 else torch.zeros_like(values)
    return (
        nn.functional.pad(coordinates, (0, count - found)),
        nn.functional.pad(shares, (0, count - found)),
    )


def parameter_blocks(networks: Networks, width: int) -> Iterator[Tensor]:
    """The parameters of all n networks, as float64 blocks of shape (n, about ``width``).

    A block is wider than ``width`` only if one row of a parameter, or one complex number, is.
    """
    for pieces in _pieces(networks.index.layout.parameters, width):
        block: Tensor | None = None
        for i in range(len(networks)):
            row = torch.cat([flat_numbers(part) for part in networks.read_pieces(i, pieces)])
            if block is None:
                block = row.new_empty(len(networks), len(row))
            block[i] = row
        assert block is not None
        yield block


def _pieces(shapes: Mapping[str, tuple[int, ...]], width: int) -> Iterator[list[Piece]]:
    """Cut parameters of these shapes into lists of pieces with about ``width`` entries together.

    A parameter is cut along its first dimension, and a piece has at least one row.
    """
    pieces: list[Piece] = []
    size = 0
    for name, shape in shapes.items():
        rows = shape[0] if shape else 1
        row = max(1, math.prod(shape) // max(1, rows))
        start = 0
        while start < rows:
            stop = min(rows, start + max(1, (width - size) // row))
            if pieces and size + (stop - start) * row > width:
                yield pieces
                pieces, size = [], 0
                continue
            pieces.append((name, slice(start, stop)))
            size += (stop - start) * row
            start = stop
    if pieces:
        yield pieces


def color_numbers(color: Iterable[Any], count: int) -> list[float]:
    """One number for each of ``count`` networks, NaN for None.

    Raises:
        ValueError: If ``color`` does not hold ``count`` numbers.
    """
    try:
        numbers = [math.nan if number is None else float(number) for number in color]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"color: must hold one number for each network, got {reprlib.repr(color)}."
        ) from error
    if len(numbers) != count:
        raise ValueError(
            f"color: must hold one number for each of the {count} networks, got {len(numbers)}."
        )
    return numbers


def draw_path(
    points: Tensor, shares: Tensor, color: Sequence[float], ax: Axes | None, label: str, cmap: str
) -> Axes:
    """Draw networks as points in a plane, joined in order; ``FIPPath.plot`` describes the other arguments.

    Args:
        points: The coordinates of the n networks, (n, 2).
        shares: The share of the variance that each of the two components holds, (2,).
        color: One number for each network.
        ax: The axes to draw in; those of a new figure if None.
        label: The name of the numbers.
        cmap: A matplotlib colour map.

    Raises:
        ImportError: If ``ax`` is None and matplotlib is not installed.
    """
    if ax is None:
        ax = import_for("draw a path", "matplotlib.pyplot").subplots()[1]
        assert ax is not None
    x, y = points[:, 0].tolist(), points[:, 1].tolist()
    ax.plot(x, y, color="0.7", linewidth=1, zorder=1)
    marks = ax.scatter(x, y, c=color, cmap=cmap, s=18, zorder=2)
    ax.scatter(x[:1], y[:1], marker="s", facecolor="none", edgecolor="black", s=60, label="start")
    ax.scatter(x[-1:], y[-1:], marker="*", facecolor="none", edgecolor="black", s=110, label="end")
    ax.figure.colorbar(marks, ax=ax, label=label)
    ax.set_xlabel(f"component 1 ({float(shares[0]):.0%} of the variance)")
    ax.set_ylabel(f"component 2 ({float(shares[1]):.0%})")
    ax.legend(frameon=False)
    return ax
