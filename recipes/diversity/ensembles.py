"""Ensembles: several networks made from one, saved as files so that one is in memory at a time."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from recipes.common import stored
from recipes.common.augment import Augment
from recipes.common.data import Task
from recipes.common.progress import Progress
from recipes.diversity.methods import METHODS
from recipes.diversity.settings import EnsembleSettings
from recipes.diversity.source import Build, EnsembleSource

SECONDS_FILE = "seconds.json"  # beside the members: the seconds spent on each


@dataclass
class Ensemble:
    """Networks in files.

    Attributes:
        model: The architecture; weights are loaded into copies of it.
        files: One safetensors file for each member.
        seconds: Time spent from the start network to all members.
        lengths: The Euclidean length of the path to each member; None if the method walks no path.
    """

    model: nn.Module
    files: list[Path]
    seconds: float
    lengths: list[float] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[nn.Module]:
        """The members in eval mode; each is loaded when it is asked for."""
        for file in self.files:
            member = copy.deepcopy(self.model)
            member.load_state_dict(load_file(file))
            yield member.eval().requires_grad_(False)


def build_ensemble(
    method: str,
    start: nn.Module,
    build: Build,
    task: Task,
    settings: EnsembleSettings,
    *,
    folder: Path,
    config: Mapping[str, Any] | None = None,
    augment: Augment | None,
    distances: Sequence[float] = (),
    seed: int,
    resume: bool = False,
    progress: Progress = lambda steps, text: None,
) -> Ensemble:
    """Makes an ensemble.

    Args:
        method: One of ``METHODS``.
        start: The trained network; left as it is.
        build: Makes its architecture, newly initialised.
        task: The data that it was trained on.
        settings: The settings.
        folder: The folder of the members. Members of an earlier run are removed, except with ``resume``.
        config: Everything that the members depend on, stored with each; None is the settings and the seed.
        augment: Changes inputs as in training; anchors and objectives see their inputs changed alike. None leaves them
            as they are.
        distances: For weight noise, the Euclidean distance of each member from the start network.
        seed: The seed of everything drawn.
        resume: Whether to keep the members that an interrupted run of the same configuration left in ``folder``, if
            the method can go on after them.
        progress: Called with the number of steps just taken and a text.

    Raises:
        ValueError: If there are fewer than two members, or the method is unknown.
        DataError: If members that are to be kept are of another configuration.
    """
    if settings.members < 2:
        raise ValueError(f"members: an ensemble has two or more, got {settings.members}.")
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is unknown; choose from {', '.join(METHODS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    config = {**settings.flat(), "seed": seed} if config is None else config
    resumed = resume and METHODS[method].is_resumable
    spent = check_members(folder, config) if resumed else []
    files = [member_file(folder, k) for k in range(len(spent))]
    for old in {*folder.glob("*.safetensors"), folder / SECONDS_FILE}.difference(files):
        old.unlink(missing_ok=True)
    torch.manual_seed(seed)
    source = EnsembleSource(start, build, task, settings, augment, distances, seed, progress)
    lengths = []
    begun = time.perf_counter()
    for member in METHODS[method].members(source, files):
        files.append(member_file(folder, len(files)))
        stored.save_tensors(files[-1], member.state, config)
        spent.append(time.perf_counter() - begun)
        stored.save_record(folder / SECONDS_FILE, {"seconds": spent}, config)
        if member.length is not None:
            lengths.append(member.length)
        begun = time.perf_counter()
    return Ensemble(start, files, sum(spent), lengths or None)


def member_file(folder: Path, k: int) -> Path:
    """The file of member ``k`` of the ensemble in ``folder``."""
    return folder / f"member-{k:03d}.safetensors"


def check_members(folder: Path, config: Mapping[str, Any]) -> list[float]:
    """Checks the members that an interrupted run left.

    Returns:
        The seconds spent on each of them.

    Raises:
        DataError: If a file is of another configuration, or cannot be read.
    """
    found = stored.load_record(folder / SECONDS_FILE, config)
    spent: list[float] = found["seconds"] if found else []
    for k in range(len(spent)):
        stored.check_tensors(member_file(folder, k), config)
    return spent
