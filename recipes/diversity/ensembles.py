"""Several networks from one: by walking along functionally invariant paths, and as others make ensembles.

Every way leaves its members as files in a folder, so that however many there are, one is in memory at a time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from recipes.common import stored
from recipes.common.augment import Augment
from recipes.common.data import Task
from recipes.common.progress import Progress
from recipes.diversity.baselines import Build, distilled, geometric, independent, noise
from recipes.diversity.path import walk
from recipes.diversity.settings import WAYS, Settings
from recipes.diversity.steps import Given

SPENT = "seconds.json"  # beside the members


@dataclass
class Ensemble:
    """Networks in files.

    Attributes:
        model: The architecture; weights are loaded into copies of it.
        files: One safetensors file a member.
        seconds: Spent from the start network to all members.
        lengths: For a path, the Euclidean length walked to each member.
    """

    model: nn.Module
    files: list[Path]
    seconds: float
    lengths: list[float] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[nn.Module]:
        """The members in eval mode, each loaded as it is asked for."""
        for file in self.files:
            member = copy.deepcopy(self.model)
            member.load_state_dict(load_file(file))
            yield member.eval().requires_grad_(False)


def build_ensemble(
    way: str,
    start: nn.Module,
    build: Build,
    task: Task,
    settings: Settings,
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
        way: Of ``WAYS``.
        start: The trained network; left as it is.
        build: Makes the architecture, newly initialised.
        task: What it was trained on.
        settings: How.
        folder: Where the members go; what an earlier run left there is written over, but for ``resume``.
        config: What the members depend on, stored with each; None is the settings and the seed.
        augment: What training sees of its inputs; what holds the function, and objectives, see the same.
        distances: For weight noise, how far from the start network each member is.
        seed: Of everything drawn.
        resume: Keep the independent networks that an interrupted run of the same configuration left in ``folder``.
        progress: Called with the number of steps just taken and what is going on.

    Raises:
        ValueError: If there are fewer than two members, or an unknown way.
        DataError: If networks that are to be kept are of another configuration.
    """
    if settings.members < 2:
        raise ValueError(f"members: an ensemble has two or more, got {settings.members}.")
    if way not in WAYS:
        raise ValueError(f"way: {way!r} is unknown; choose from {', '.join(WAYS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    config = {**asdict(settings), "seed": seed} if config is None else config
    spent = check_members(folder, config) if resume and way == "independent" else []
    files = [member_file(folder, k) for k in range(len(spent))]
    for old in {*folder.glob("*.safetensors"), folder / SPENT}.difference(files):
        old.unlink(missing_ok=True)
    torch.manual_seed(seed)
    given = Given(start, task, settings, augment, seed, progress)
    if WAYS[way].path:
        members = walk(WAYS[way], given, files)
    elif WAYS[way].objective is not None:
        members = distilled(WAYS[way], given, files)
    elif way == "fge":
        members = geometric(given)
    elif way == "noise":
        members = noise(given, distances)
    else:
        members = independent(build, given, len(spent))
    lengths = []
    begun = time.perf_counter()
    for member in members:
        files.append(member_file(folder, len(files)))
        stored.save_tensors(files[-1], member.state, config)
        spent.append(time.perf_counter() - begun)
        stored.save_record(folder / SPENT, {"seconds": spent}, config)
        if member.length is not None:
            lengths.append(member.length)
        begun = time.perf_counter()
    return Ensemble(start, files, sum(spent), lengths or None)


def member_file(folder: Path, k: int) -> Path:
    """Where the ensemble in ``folder`` has its member ``k``."""
    return folder / f"member-{k:03d}.safetensors"


def check_members(folder: Path, config: Mapping[str, Any]) -> list[float]:
    """Seconds that an interrupted run spent on each member it has left.

    Raises:
        DataError: If it was of another configuration.
    """
    found = stored.load_record(folder / SPENT, config)
    spent: list[float] = found["seconds"] if found else []
    for k in range(len(spent)):
        stored.check_tensors(member_file(folder, k), config)
    return spent
