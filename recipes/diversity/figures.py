"""The figures of ``recipes.diversity``: attacks, weight space, likeness of input gradients, layers, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from safetensors.torch import load_file
from sklearn.decomposition import PCA
from torch import Tensor

from recipes.common.figures import plain, save
from recipes.diversity.methods import METHODS

# The colours of the methods, in the order of METHODS.
_COLOURS = (
    "#9dbfe3",
    "#6a51a3",
    "#1f5fa8",
    "#17a2a2",
    "#d9730d",
    "#4c9150",
    "#b03a5b",
    "#e39ab0",
    "0.6",
)
Records = Mapping[str, Sequence[Mapping[str, Any]]]


def _colour(method: str) -> str:
    """The colour of a method, the same whichever others are drawn."""
    return _COLOURS[list(METHODS).index(method) % len(_COLOURS)]


def attacks(path: Path, records: Records, starts: Sequence[Mapping[str, Any]]) -> None:
    """Draws the accuracy on images that fool the start network (Fig. 4C, 4D): a dot a member, a line a joint ensemble.

    Args:
        path: The file.
        records: The records of each method's ensembles, one a seed.
        starts: The records of the start networks.
    """
    figure, axes = plt.subplots(figsize=(7.0, 4.4), layout="constrained")
    keys = list(starts[0]["transfer"])
    eps = np.array([float(key) for key in keys])
    spread = np.min(np.diff(eps)) if len(eps) > 1 else 0.01
    start = [np.mean([s["transfer"][key] for s in starts]) for key in keys]
    axes.plot(eps, start, "k:", marker="*", label="start network")
    for k, (method, runs) in enumerate(records.items()):
        shift = (k - (len(records) - 1) / 2) * 0.08 * spread
        for run in runs:
            for x, key in zip(eps, keys, strict=True):
                members = run["transfer"][key]["members"]
                axes.plot(
                    [x + shift] * len(members), members, ".", color=_colour(method), alpha=0.4, ms=4
                )
        joint = [np.mean([run["transfer"][key]["joint"] for run in runs]) for key in keys]
        axes.plot(
            eps + shift, joint, "o-", color=_colour(method), ms=4, label=METHODS[method].title
        )
    axes.set_xlabel("largest change of a pixel")
    axes.set_ylabel("accuracy on attacked test images (%)")
    axes.set_ylim(-3, 103)
    axes.legend(frameon=False, fontsize=8)
    plain(axes)
    save(figure, path)


def coherence(path: Path, records: Records) -> None:
    """Draws how alike the members' input gradients are to the start network's (Fig. 4E)."""
    figure, axes = plt.subplots(figsize=(6.0, 3.8), layout="constrained")
    for method, runs in records.items():
        counts = np.sum([run["coherence_histogram"] for run in runs], axis=0)
        edges = np.linspace(-1, 1, len(counts) + 1)
        mean = np.mean([run["coherence"] for run in runs])
        axes.stairs(
            counts / counts.sum(),
            edges,
            color=_colour(method),
            linewidth=1.8,
            label=f"{METHODS[method].title}: mean {mean:.2f}",
        )
    axes.set_xlabel("cosine of input gradients with the start network's")
    axes.set_ylabel("share of members and images")
    axes.legend(frameon=False, fontsize=8)
    plain(axes)
    save(figure, path)


def layers(path: Path, records: Records) -> None:
    """Draws the diversity score of each layer (Fig. 4F)."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for method, runs in records.items():
        found = np.array([run["diversity_by_layer"] for run in runs])
        axes.plot(
            range(1, found.shape[1] + 1),
            found.mean(axis=0),
            "o-",
            color=_colour(method),
            ms=4,
            label=METHODS[method].title,
        )
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("deviation of activation norms")
    axes.legend(frameon=False, fontsize=8)
    plain(axes)
    save(figure, path)


def weight_space(path: Path, start: Path, members: Mapping[str, Sequence[Path]]) -> None:
    """Draws the members of each ensemble in the plane of their principal components (Fig. 4C).

    Args:
        path: The file.
        start: The safetensors file of the start network.
        members: The safetensors files of the members, by method.
    """
    rows = [_flat(start), *(_flat(file) for files in members.values() for file in files)]
    pca = PCA(2, svd_solver="randomized", random_state=0)
    plane = pca.fit_transform(np.stack(rows))
    figure, axes = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
    begun = 1
    for method, files in members.items():
        part = plane[begun : begun + len(files)]
        begun += len(files)
        line = "-" if METHODS[method].objective is not None else ""
        axes.plot(
            *part.T,
            line,
            marker="o",
            color=_colour(method),
            ms=4,
            lw=1,
            label=METHODS[method].title,
        )
    axes.plot(*plane[0], "*", color="black", markersize=13, label="start network")
    shares = 100 * pca.explained_variance_ratio_
    axes.set_xlabel(f"first principal component ({shares[0]:.0f} %)")
    axes.set_ylabel(f"second ({shares[1]:.0f} %)")
    axes.legend(frameon=False, fontsize=8)
    plain(axes)
    save(figure, path)


def _flat(file: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The weights, biases and running statistics of a network as one flat vector; counters are left out."""
    state = load_file(file)
    parts = [t.flatten() for name, t in sorted(state.items()) if t.is_floating_point()]
    flat: np.ndarray[Any, np.dtype[np.float32]] = np.concatenate([p.numpy() for p in parts])
    return flat


def pictures(
    path: Path,
    images: Mapping[str, Tensor],
    predicted: Mapping[str, Mapping[str, Sequence[int]]],
) -> None:
    """Draws test images with the classes that the start network and the joint ensembles predict (Fig. 4B).

    Args:
        path: The file.
        images: For each kind, clean and attacked, images ``(n, channels, h, w)`` in [0, 1] on the CPU.
        predicted: The predicted classes by method (or start network) and kind.
    """
    count = len(next(iter(images.values())))
    figure, axes = plt.subplots(
        len(images),
        count,
        figsize=(1.7 * count, 3.8 + 0.3 * len(predicted)),
        squeeze=False,
        layout="constrained",
    )
    for row, (kind, shown) in enumerate(images.items()):
        for k, (axis, image) in enumerate(zip(axes[row], shown, strict=True)):
            picture = image.permute(1, 2, 0).numpy()
            axis.imshow(picture, vmin=0, vmax=1, cmap="gray" if picture.shape[2] == 1 else None)
            classes = [
                f"{METHODS[name].title if name in METHODS else 'start network'}: {found[kind][k]}"
                for name, found in predicted.items()
            ]
            axis.set_title("\n".join(classes), fontsize=6.5)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row, 0].set_ylabel(kind)
    save(figure, path)
