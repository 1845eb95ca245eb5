"""The runs of ``recipes.finetune``: from the start of each seed, every method trains copies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.common import processes
from recipes.common.experiment import Content, Experiment, Save
from recipes.common.progress import progress_bar
from recipes.finetune import tables
from recipes.finetune.measures import Measures
from recipes.finetune.methods import METHODS
from recipes.finetune.methods.method import Run
from recipes.finetune.problem import Problem, Start
from recipes.finetune.settings import FinetuneSettings

PER_MILLE = 1000


class FinetuneExperiment(Experiment[Start, Content]):
    """The runs of all seeds and methods on one problem, and the files that they leave.

    Args:
        problem: What is learnt, and what is to stay.
        settings: The settings.
        config: Everything that results depend on except the seed.
        out: The folder.
        environment: A description of this machine, stored with every result.
        progress: Whether to show progress bars.
    """

    def __init__(
        self,
        problem: Problem,
        settings: FinetuneSettings,
        *,
        config: Mapping[str, Any],
        out: Path,
        environment: Mapping[str, Any],
        progress: bool,
    ) -> None:
        super().__init__(out, config, list(METHODS))
        self.problem, self.settings = problem, settings
        self.environment, self.progress = environment, progress

    def start(self, seed: int) -> Start:
        """The pretrained network with its new outputs, and the inputs that are drawn for the seed."""
        found = self.problem.start(seed)
        processes.of_first(found.case.start)
        print(tables.line(seed, "start", Measures(*found).point(found.case.start)))
        return found

    def run_method(
        self, seed: int, method: str, start: Start, partial: Content | None, save: Save
    ) -> None:
        """Trains a copy of the start with each choice of the method's settings, and measures all networks."""
        chosen = METHODS[method]
        measures = Measures(*start)
        points = list[dict[str, Any]]()
        for choice in chosen.choices(self.settings):
            title = f"seed {seed}, {chosen.title}"
            run = Run(chosen, start.case, self.settings, choice, seed=seed)
            with progress_bar(title, PER_MILLE, shown=self.progress) as show:
                done = 0
                while not run.finished:
                    run.advance()
                    now = min(PER_MILLE, round(PER_MILLE * run.share))
                    show(now - done, f"{run.steps} steps")
                    done = now
            for named, network in chosen.networks(run, start.case, self.settings):
                points.append(
                    {
                        "choice": dict(named),
                        "steps": run.steps,
                        "seconds": run.seconds,
                        "account": run.account,
                        **measures.point(network),
                    }
                )
        save(
            {
                "title": chosen.title,
                "kept_title": start.unseen.kept,
                "environment": self.environment,
                "points": points,
            }
        )

    def result_of(self, content: Content) -> Content:
        """A result is the content of its file."""
        return content

    def on_result(self, seed: int, method: str, result: Content) -> None:
        """Prints a line for each network."""
        for point in result["points"]:
            print(tables.line(seed, result["title"], point), flush=True)
