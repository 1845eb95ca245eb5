"""The runs of ``recipes.diversity``: ensembles made, attacked and measured, each kept when it is finished."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.common import report, stored
from recipes.common.augment import augmentation
from recipes.common.checkpoints import load_weights
from recipes.common.data import DATASETS, DataError, Task
from recipes.common.process_memory import give_back
from recipes.common.progress import progress_bar
from recipes.common.training import accuracy, steps_an_epoch
from recipes.diversity import figures as diversity_figures
from recipes.diversity import tables as diversity_tables
from recipes.diversity.attacks import Joint, Pixels, auto_attack, pgd
from recipes.diversity.baselines import train_network
from recipes.diversity.ensembles import SPENT, Ensemble, build_ensemble, check_members, member_file
from recipes.diversity.measures import (
    Votes,
    activation_norms,
    coherence,
    distance,
    diversity_scores,
    percent,
    probabilities,
)
from recipes.diversity.networks import Attacks, Network
from recipes.diversity.settings import PATHS, WAYS, Settings, steps_of

RECIPE = "diversity"
SCORED = 1000  # test images of which activations and input gradients are compared
SHOWN = 6  # attacked images drawn
BINS = 20  # of the histogram of coherence


class Experiment:
    """The runs of all seeds and ways on one network, and the files that they leave."""

    def __init__(
        self,
        network: Network,
        task: Task,
        settings: Settings,
        attacks: Attacks,
        checkpoint: Path | None,
        config: Mapping[str, Any],
        out: Path,
    ) -> None:
        self.network, self.task, self.settings, self.attacks = network, task, settings, attacks
        self.checkpoint, self.config, self.out = checkpoint, config, out
        self.info = DATASETS[task.name]
        self.augment = augmentation(task.name) if network.augment else None
        self.images = self.info.pixels(task.test_inputs)
        self.labels = task.test_labels

    def folder(self, seed: int) -> Path:
        """Where a seed's networks and records are."""
        return self.out / f"seed-{seed}"

    def config_of(self, seed: int) -> dict[str, Any]:
        """What a seed's files depend on."""
        return {**self.config, "seed": seed}

    def finished(self, seed: int, way: str) -> dict[str, Any] | None:
        """The record of a finished run.

        Raises:
            DataError: If it is of another configuration, or cannot be read.
        """
        return stored.load_record(self._record(seed, way), self.config_of(seed))

    def _start_file(self, seed: int) -> Path:
        return self.folder(seed) / "start.safetensors"

    def _attacked_file(self, seed: int) -> Path:
        return self.folder(seed) / "attacked.safetensors"

    def _record(self, seed: int, way: str) -> Path:
        return self.folder(seed) / f"{way}.json"

    def clear(self, seeds: Sequence[int]) -> None:
        """Removes what a resumed run would take for this run's."""
        for seed in seeds:
            for name in ("start", *WAYS):
                self._record(seed, name).unlink(missing_ok=True)
                (self.folder(seed) / name / SPENT).unlink(missing_ok=True)
            self._start_file(seed).unlink(missing_ok=True)
            self._attacked_file(seed).unlink(missing_ok=True)

    def check_resumable(self, seeds: Sequence[int]) -> None:
        """Refuses what another configuration left.

        Raises:
            DataError: With the differences.
        """
        for seed in seeds:
            config = self.config_of(seed)
            for way in WAYS:
                if self.finished(seed, way):
                    for file in self._members(seed, way):
                        stored.check_tensors(file, config)
            if self.finished(seed, "start"):
                stored.check_tensors(self._start_file(seed), config)
                if self._attacked_file(seed).exists():
                    stored.check_tensors(self._attacked_file(seed), config)
            check_members(self.folder(seed) / "independent", config)

    def _members(self, seed: int, way: str) -> list[Path]:
        folder = self.folder(seed) / way
        return [member_file(folder, k) for k in range(self.settings.members)]

    # --- one seed -------------------------------------------------------------------------------------

    def run(self, seed: int, ways: Sequence[str], *, resume: bool, progress: bool) -> None:
        """All ways of one seed, from one start network."""
        self.folder(seed).mkdir(parents=True, exist_ok=True)
        if resume and all(self.finished(seed, name) for name in ("start", *ways)):
            return
        start = self._start(seed, progress=progress)
        attacked = self._transfer(start, seed)
        for way in ways:
            if self.finished(seed, way):
                continue
            ensemble = self._build(way, start, seed, resume=resume, progress=progress)
            record = self._measure(ensemble, start, attacked, seed)
            stored.save_record(self._record(seed, way), record, self.config_of(seed))
            print(diversity_tables.line(seed, way, record), flush=True)

    def _start(self, seed: int, *, progress: bool) -> nn.Module:
        """The start network: the checkpoint's, what an earlier run trained, or one trained now."""
        file, config = self._start_file(seed), self.config_of(seed)
        model = self.network.build().to(self.images.device)
        # The layout that convolutions on a CPU prefer; all that is made from the start network keeps it.
        model = model.to(memory_format=torch.channels_last)
        if self.finished(seed, "start"):
            model.load_state_dict(stored.load_tensors(file, config))
            return model.eval()
        seconds = 0.0
        if self.checkpoint is not None:
            load_weights(self.checkpoint, model)
            model.eval()
        else:
            steps = self.settings.epochs * steps_an_epoch(self.task, self.settings.batch_size)
            with progress_bar(f"seed {seed}, start", steps, shown=progress) as show:
                begun = time.perf_counter()
                model = train_network(
                    self.network.build,
                    self.task,
                    self.settings,
                    augment=self.augment,
                    seed=seed,
                    progress=show,
                )
                seconds = time.perf_counter() - begun
        stored.save_tensors(file, model.state_dict(), config)
        clean = accuracy(model, self.task.test_inputs, self.labels, batch_size=500)
        self._attacked_file(seed).unlink(missing_ok=True)
        record = {"accuracy": clean, "seconds": seconds}
        stored.save_record(self._record(seed, "start"), record, config)
        return model

    def _transfer(self, start: nn.Module, seed: int) -> dict[float, Tensor]:
        """What fools the start network, for each size of the attack; made once."""
        file, config = self._attacked_file(seed), self.config_of(seed)
        record = _known(self.finished(seed, "start"))
        if file.exists() and "transfer" in record:
            found = stored.load_tensors(file, config)
            return {eps: found[f"{eps:.6g}"].to(self.images) for eps in self.attacks.attack_eps}
        count = self.attacks.attack_images
        images, labels = self.images[:count], self.labels[:count]
        pixels = Pixels(start, self.info)
        made = {
            eps: self._pgd(pixels, images, labels, eps, seed) for eps in self.attacks.attack_eps
        }
        stored.save_tensors(file, {f"{eps:.6g}": x for eps, x in made.items()}, config)
        fooled = {f"{eps:.6g}": percent(_classes(pixels, x) == labels) for eps, x in made.items()}
        stored.save_record(self._record(seed, "start"), {**record, "transfer": fooled}, config)
        return made

    def _build(
        self, way: str, start: nn.Module, seed: int, *, resume: bool, progress: bool
    ) -> Ensemble:
        walked = [r for w in PATHS if (r := self.finished(seed, w)) is not None]
        if way == "noise" and not walked:
            raise DataError(
                "noise is as long as a path: run a path with it, or before it with --resume"
            )
        steps = steps_of(way, self.task, self.settings)
        with progress_bar(f"seed {seed}, {WAYS[way].title}", steps, shown=progress) as show:
            return build_ensemble(
                way,
                start,
                self.network.build,
                self.task,
                self.settings,
                folder=self.folder(seed) / way,
                config=self.config_of(seed),
                augment=self.augment,
                distances=walked[-1]["distances"] if walked else (),
                seed=seed,
                resume=resume,
                progress=show,
            )

    def _measure(
        self, ensemble: Ensemble, start: nn.Module, attacked: Mapping[float, Tensor], seed: int
    ) -> dict[str, Any]:
        """Everything about one ensemble; its members are in memory one at a time, but for the attack on them all."""
        attacks = self.attacks
        some = self.labels[: attacks.attack_images]
        few = attacks.white_box_images
        clean = Votes(self.labels)
        transfer = {eps: Votes(some) for eps in attacked}
        alone, norms, cosines, distances = (
            list[float](),
            list[Tensor](),
            list[Tensor](),
            list[float](),
        )
        attacked_network = Pixels(start, self.info)
        for member in ensemble:
            pixels = Pixels(member, self.info)
            clean.add(probabilities(pixels, self.images))
            for eps, images in attacked.items():
                transfer[eps].add(probabilities(pixels, images))
            found = self._pgd(pixels, self.images[:few], self.labels[:few], attacks.table_eps, seed)
            alone.append(percent(_classes(pixels, found) == self.labels[:few]))
            norms.append(activation_norms(pixels, self.images[:SCORED]))
            cosines.append(
                coherence(
                    pixels,
                    attacked_network,
                    self.images[:SCORED],
                    self.labels[:SCORED],
                )
            )
            distances.append(distance(member, start))
        joint = Joint([Pixels(member, self.info) for member in ensemble]).eval()
        white = self._pgd(joint, self.images[:few], self.labels[:few], attacks.table_eps, seed)
        record: dict[str, Any] = {
            "clean": {"joint": clean.joint, "mean": clean.mean, "members": clean.accuracies},
            "transfer": {
                f"{eps:.6g}": {"joint": v.joint, "mean": v.mean, "members": v.accuracies}
                for eps, v in transfer.items()
            },
            "white_box_members": alone,
            "white_box_joint": percent(_classes(joint, white) == self.labels[:few]),
            "auto_attack_joint": None,
            "disagreement": clean.disagreement,
            "diversity_by_layer": diversity_scores(norms),
            "coherence": float(torch.cat(cosines).mean()),
            "coherence_histogram": torch.cat(cosines).float().histc(BINS, -1, 1).tolist(),
            "distances": distances,
            "lengths": ensemble.lengths,
            "seconds": ensemble.seconds,
            "shown": {
                "clean": _classes(joint, self.images[:SHOWN]).tolist(),
                "attacked": _classes(joint, attacked[attacks.table_eps][:SHOWN]).tolist(),
            },
        }
        if attacks.auto_attack_images:
            images = self.images[: attacks.auto_attack_images]
            labels = self.labels[: attacks.auto_attack_images]
            found = auto_attack(
                joint, images, labels, attacks.table_eps, classes=self.task.classes, seed=seed
            )
            record["auto_attack_joint"] = percent(_classes(joint, found) == labels)
        return record

    def _pgd(
        self, network: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int
    ) -> Tensor:
        found = pgd(
            network.eval(),
            images,
            labels,
            eps,
            steps=self.attacks.attack_steps,
            restarts=self.attacks.attack_restarts,
            seed=seed,
        )
        give_back()
        return found

    # --- what is left ---------------------------------------------------------------------------------

    def report(self, seeds: Sequence[int], ways: Sequence[str], device: torch.device) -> None:
        """The table, ``results.json`` and the plots."""
        records = {way: [_known(self.finished(seed, way)) for seed in seeds] for way in ways}
        starts = [_known(self.finished(seed, "start")) for seed in seeds]
        print(f"\n{diversity_tables.table(records, starts, self.attacks)}")
        report.write_results(
            self.out / "results.json",
            recipe=RECIPE,
            config={**self.config, "seeds": list(seeds)},
            environment=report.environment(device),
            metrics=diversity_tables.metrics(records, starts),
        )
        config = self.config_of(seeds[0])
        start_file = self._start_file(seeds[0])
        diversity_figures.attacks(self.out / "attacks.png", records, starts)
        diversity_figures.coherence(self.out / "coherence.png", records)
        diversity_figures.layers(self.out / "layers.png", records)
        names = {way: self._members(seeds[0], way) for way in ways}
        diversity_figures.weight_space(self.out / "weights.png", start_file, names)
        attacked = stored.load_tensors(self._attacked_file(seeds[0]), config)
        attacked_most = attacked[f"{self.attacks.table_eps:.6g}"]
        start = self.network.build()
        start.load_state_dict(stored.load_tensors(start_file, config))
        pixels = Pixels(start, self.info).eval().to(self.images.device)
        shown = attacked_most[:SHOWN].to(self.images)
        diversity_figures.pictures(
            self.out / "pictures.png",
            self.images[:SHOWN].cpu(),
            attacked_most[:SHOWN],
            {
                "start": {
                    "clean": _classes(pixels, self.images[:SHOWN]).tolist(),
                    "attacked": _classes(pixels, shown).tolist(),
                },
                **{way: found[0]["shown"] for way, found in records.items()},
            },
        )
        print(f"results.json, the members and the plots are in {self.out}")


def _classes(model: nn.Module, images: Tensor) -> Tensor:
    return probabilities(model, images).argmax(dim=1)


def _known(record: dict[str, Any] | None) -> dict[str, Any]:
    assert record is not None
    return record
