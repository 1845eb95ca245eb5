"""The runs of all seeds and methods in one folder: each result is written when it is finished, and read when resumed.

A recipe derives from :class:`Experiment` and says two things: what all methods of a seed begin with, usually a trained
network, and what one method does from there. Everything about files is here: which results are finished, where they
are, and the refusal of files that another configuration left. Among several processes rank 0 alone has files, and the
others follow what it finds in them.
"""

from __future__ import annotations

import argparse
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from recipes.common import processes, stored
from recipes.common.data import DataError

Start = TypeVar("Start")  # what all methods of a seed begin with
Result = TypeVar("Result")  # what one method of one seed found
Content = dict[str, Any]  # what a result's file holds
Save = Callable[[Mapping[str, Any]], None]


class Experiment(ABC, Generic[Start, Result]):
    """All runs of a recipe with one configuration, and the files that they leave.

    Attributes:
        result_suffix: ``".json"`` if results are plain values, ``".pt"`` if there are tensors among them.
        start_files: Names of the files in a seed's folder that hold what its methods begin with.
        start_keys: Keys of the configuration, ``"seed"`` among them, on which those files depend. The files serve every
            run that agrees in these; None stands for all keys.

    Args:
        out: The folder.
        config: Everything that results depend on except the seed. It is stored with every file, so JSON must hold it.
        methods: Methods whose files belong to this experiment, whether they are asked for or not: a new run removes
            these files, a resumed run checks them.
    """

    result_suffix = ".json"
    start_files: Sequence[str] = ()
    start_keys: Sequence[str] | None = None

    def __init__(self, out: Path, config: Mapping[str, Any], methods: Sequence[str]) -> None:
        self.out, self.config, self.methods = out, config, methods

    # A recipe writes these three, and the hooks after them if it needs them.

    @abstractmethod
    def start(self, seed: int) -> Start:
        """Makes or loads what all methods of a seed begin with."""

    @abstractmethod
    def run_method(
        self, seed: int, method: str, start: Start, partial: Content | None, save: Save
    ) -> None:
        """Runs one method.

        Args:
            seed: The seed of everything drawn.
            method: The name of the method.
            start: What :meth:`start` returned; to be left as it is.
            partial: What an interrupted run saved last of this method; None if nothing.
            save: Writes the result's file. A method that can be resumed in the middle calls it several times; after
                the last call :meth:`is_finished` must hold for what was saved.
        """

    @abstractmethod
    def result_of(self, content: Content) -> Result:
        """Makes a result from the content of its file."""

    def is_finished(self, content: Content) -> bool:
        """Whether a saved result is whole, rather than what an interrupted method is resumed from."""
        return True

    def needs_run(self, seed: int, unfinished: Sequence[str]) -> bool:
        """Whether anything is left to do for a seed; ``unfinished`` are its methods that have not finished."""
        return bool(unfinished)

    def tensor_files(self, seed: int, method: str) -> Sequence[Path]:
        """The safetensors files that belong to a finished result, beside the result's own file."""
        return ()

    def on_result(self, seed: int, method: str, result: Result) -> None:
        """Called when a method has finished; not for results that an earlier run left."""

    def on_seed(self, seed: int, methods: Sequence[str]) -> None:
        """Called when all methods of a seed are finished."""

    # Files.

    def folder(self, seed: int) -> Path:
        """The folder of a seed's files."""
        return self.out / f"seed-{seed}"

    def result_file(self, seed: int, method: str) -> Path:
        """The file of a method's result."""
        return self.folder(seed) / f"{method}{self.result_suffix}"

    def config_of(self, seed: int) -> Content:
        """Everything that a seed's results depend on."""
        return {**self.config, "seed": seed}

    def start_config_of(self, seed: int) -> Content:
        """Everything that the start files of a seed depend on."""
        config = self.config_of(seed)
        return config if self.start_keys is None else {key: config[key] for key in self.start_keys}

    def saved(self, seed: int, method: str) -> Content | None:
        """Reads what is saved of a result, whole or not; None if nothing is.

        Raises:
            DataError: If the file is of another configuration, or cannot be read.
        """
        load = stored.load_record if self.result_suffix == ".json" else stored.load_state
        return load(self.result_file(seed, method), self.config_of(seed))

    def finished(self, seed: int, method: str) -> Result | None:
        """Reads a finished result; None if the method has not finished.

        Raises:
            DataError: If the file is of another configuration, or cannot be read.
        """
        content = self.saved(seed, method)
        return (
            self.result_of(content) if content is not None and self.is_finished(content) else None
        )

    def save(self, seed: int, method: str, content: Mapping[str, Any]) -> None:
        """Writes a result's file, whole or not at all; rank 0 does."""
        if processes.ranks().rank != 0:
            return
        write = stored.save_record if self.result_suffix == ".json" else stored.save_state
        write(self.result_file(seed, method), content, self.config_of(seed))

    def results(self, seeds: Sequence[int], methods: Sequence[str]) -> dict[str, list[Result]]:
        """Reads the results of each method, one a seed in the order of ``seeds``; all must be finished.

        Raises:
            DataError: If a result is not there, is of another configuration, or cannot be read.
        """

        def result(seed: int, method: str) -> Result:
            found = self.finished(seed, method)
            if found is None:
                raise DataError(f"{self.result_file(seed, method)} holds no finished result")
            return found

        return {method: [result(seed, method) for seed in seeds] for method in methods}

    # A new run, or a resumed one.

    def clear(self, seeds: Sequence[int]) -> None:
        """Removes every file that a resumed run would take for this run's."""
        for seed in seeds:
            files = [self.folder(seed) / name for name in self.start_files]
            for file in (*files, *(self.result_file(seed, method) for method in self.methods)):
                file.unlink(missing_ok=True)

    def check(self, seeds: Sequence[int]) -> None:
        """Reads everything that a resumed run would take over, before anything runs.

        Raises:
            DataError: If a file is of another configuration (with the differences), or cannot be read.
        """
        for seed in seeds:
            for method in self.methods:
                if self.finished(seed, method) is not None:
                    for file in self.tensor_files(seed, method):
                        stored.check_tensors(file, self.config_of(seed))
            self.check_start(seed)

    def check_start(self, seed: int) -> None:
        """Checks the start files that are there; all of them are safetensors files here.

        Raises:
            DataError: If a file is of another configuration (with the differences), or cannot be read.
        """
        for name in self.start_files:
            if (file := self.folder(seed) / name).exists():
                stored.check_tensors(file, self.start_config_of(seed))

    def prepare(
        self, parser: argparse.ArgumentParser, seeds: Sequence[int], *, resume: bool
    ) -> None:
        """Makes the folder, then clears it for a new run or checks it for a resumed one.

        If that fails, the parser ends the program and says why.
        """
        try:
            processes.ranks().done_by_first(lambda: self._prepare(seeds, resume=resume))
        except DataError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")

    def run(self, seeds: Sequence[int], methods: Sequence[str]) -> dict[str, list[Result]]:
        """Runs every method of every seed that is not finished, seed by seed.

        Returns:
            For each method its results, one a seed. Each was read back from its file, so results of this run and of an
            earlier one are alike.

        Raises:
            DataError: If a file is of another configuration, or cannot be read.
        """
        by_first = processes.ranks().done_by_first

        def begun(seed: int) -> list[str]:
            self.folder(seed).mkdir(parents=True, exist_ok=True)
            return [method for method in methods if self.finished(seed, method) is None]

        for seed in seeds:
            unfinished = by_first(functools.partial(begun, seed))
            if self.needs_run(seed, unfinished):
                start = self.start(seed)
                for method in unfinished:
                    self._run_one(seed, method, start)
            self.on_seed(seed, methods)
        return by_first(lambda: self.results(seeds, methods))

    def _prepare(self, seeds: Sequence[int], *, resume: bool) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"argument --out: cannot make the folder {self.out}: {error.strerror}"
            ) from error
        if resume:
            self.check(seeds)
        else:
            self.clear(seeds)

    def _run_one(self, seed: int, method: str, start: Start) -> None:
        def save(content: Mapping[str, Any]) -> None:
            self.save(seed, method, content)

        by_first = processes.ranks().done_by_first
        partial = by_first(lambda: self.saved(seed, method))
        self.run_method(seed, method, start, partial, save)
        result = by_first(lambda: self.finished(seed, method))
        if result is None:
            raise RuntimeError(f"{method} of seed {seed} returned before its result was saved")
        self.on_result(seed, method, result)
