"""The runs of ``recipes.spectrum``: a network of each seed before and after training, and what is measured of it."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from recipes.common import stored
from recipes.common.experiment import Content, Experiment, Save
from recipes.common.progress import progress_bar
from recipes.spectrum.measurements import MEASUREMENTS
from recipes.spectrum.networks.network import Network
from recipes.spectrum.settings import SpectrumSettings
from recipes.spectrum.start import Start

TRAINED = "trained.safetensors"


class SpectrumExperiment(Experiment[Start, Content]):
    """The measurements of all seeds on one network, and the files that they leave.

    Args:
        network: The network.
        settings: The settings.
        config: Everything that results depend on except the seed.
        out: The folder.
        environment: A description of this machine, stored with every result.
        progress: Whether to show progress bars.
    """

    start_files = (TRAINED,)

    def __init__(
        self,
        network: Network,
        settings: SpectrumSettings,
        *,
        config: Mapping[str, Any],
        out: Path,
        environment: Mapping[str, Any],
        progress: bool,
    ) -> None:
        super().__init__(out, config, list(MEASUREMENTS))
        self.network, self.settings = network, settings
        self.environment, self.progress = environment, progress

    def start(self, seed: int) -> Start:
        """The network before and after training, which an interrupted run may have left, and the new task."""
        network = self.network
        before = network.build(seed)
        networks = {network.before: before, network.after: self._trained(before, seed)}
        at = network.before if network.at_first else network.after
        return Start(
            networks,
            at,
            network.anchors(seed),
            network.output,
            network.chunk_size,
            network.named,
            network.new_task(networks[at], seed),
            self.settings.top,
            network.trace,
        )

    def run_method(
        self, seed: int, method: str, start: Start, partial: Content | None, save: Save
    ) -> None:
        """Takes one measurement."""
        chosen, began = MEASUREMENTS[method], time.process_time()
        units = chosen.units(start, self.settings)
        with progress_bar(f"seed {seed}, {chosen.title}", units, shown=self.progress) as show:
            found = chosen.measure(start, self.settings, seed=seed, progress=show)
        seconds = time.process_time() - began
        save({"environment": self.environment, "cpu_seconds": seconds, **found})

    def result_of(self, content: Content) -> Content:
        """A result is the content of its file."""
        return content

    def on_result(self, seed: int, method: str, result: Content) -> None:
        """Prints a line."""
        title, seconds = MEASUREMENTS[method].title, result["cpu_seconds"]
        print(f"seed {seed}, {title}: {seconds:.1f} CPU seconds", flush=True)

    def _trained(self, before: nn.Module, seed: int) -> nn.Module:
        file, config = self.folder(seed) / TRAINED, self.start_config_of(seed)
        if file.exists():
            model = copy.deepcopy(before)
            model.load_state_dict(stored.load_tensors(file, config), strict=False)
            return model.eval()
        steps = self.network.training_steps
        with progress_bar(f"seed {seed}, training", steps, shown=self.progress) as show:
            model = self.network.trained(before, seed, show)
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        state = {name: t for name, t in model.state_dict().items() if name not in frozen}
        stored.save_tensors(file, state, config)
        return model
