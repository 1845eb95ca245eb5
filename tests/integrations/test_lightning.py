"""FIPCallback in the Trainer of Lightning."""

import csv
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fipoptim import AnchorBatch, FIPOptimizer
from fipoptim.integrations.lightning import FIPCallback
from fipoptim.state import steps_taken

# Lightning warns of settings that are meant here: few workers, short epochs, a folder that is there.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
]
OLD = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
LOADER = DataLoader(TensorDataset(X, torch.arange(24) % 3), batch_size=8)
MAX_DRIFT = 0.02


class Module(LightningModule):
    """A network whose anchors are built when Lightning asks for the optimizer: on resumed weights in a resumed run."""

    def __init__(self, seed=1, *, manual=False, optimizers=(), **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.automatic_optimization = not manual
        self.seed, self.optimizers_given, self.validated = seed, optimizers, []
        self.options = {"max_drift": MAX_DRIFT, "check_every": None} | options

    def configure_optimizers(self):
        if self.optimizers_given:
            return list(self.optimizers_given)
        generator = torch.Generator().manual_seed(self.seed)
        self.anchors = AnchorBatch(self.net, OLD, check=0.4, batch_size=6, generator=generator)
        self.optimizer = FIPOptimizer(
            self.net.parameters(), self.anchors, beta=5.0, eps=0.2, momentum=0.5, **self.options
        )
        return [self.optimizer], [torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)]

    def training_step(self, batch, number):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss


class Validated(Module):
    """The same, which keeps the drift at each batch of a validation."""

    def validation_step(self, batch, number):
        if not self.trainer.sanity_checking:
            self.validated.append(self.anchors.check.drift())


def trainer(folder, *callbacks, **options):
    options = {"max_epochs": 2, "log_every_n_steps": 2} | options
    return Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder),
        callbacks=[*callbacks, FIPCallback()],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def each_epoch(folder, every=3):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)


@pytest.mark.parametrize("manual", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(manual, tmp_path):
    whole = Module(manual=manual)
    start = [p.clone() for p in whole.parameters()]
    trainer(tmp_path, each_epoch(tmp_path)).fit(whole, LOADER)
    assert not any(torch.equal(p, q) for p, q in zip(start, whole.parameters(), strict=True))
    resumed = Module(seed=7, manual=manual)
    trainer(tmp_path, each_epoch(tmp_path)).fit(resumed, LOADER, ckpt_path=tmp_path / "step=3.ckpt")
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(resumed.anchors.reference, whole.anchors.reference)
    assert resumed.optimizer.last_step == whole.optimizer.last_step
    assert resumed.anchors.drift() == whole.anchors.drift() > 0


def test_what_is_validated_and_saved_is_within_the_budget_and_the_logs_say_so(tmp_path):
    module = Validated()
    runs = trainer(tmp_path, each_epoch(tmp_path, every=2), val_check_interval=1)
    runs.fit(module, LOADER, LOADER)
    assert len(module.validated) == 6 * len(LOADER)
    assert max(module.validated) <= MAX_DRIFT
    for step in (2, 4, 6):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        net = Module()
        net.load_state_dict(saved["state_dict"])
        check = module.anchors.check
        drift = (net.net(check.inputs) - check.reference).square().sum(1).mean()
        assert 0 < drift <= MAX_DRIFT * (1 + 1e-4)
    with (Path(runs.logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["max_drift"]) for row in rows if row["max_drift"]] == [
        pytest.approx(MAX_DRIFT)
    ] * 3
    assert max(float(row["settle_drift_before"] or 0) for row in rows) > MAX_DRIFT
    assert runs.callback_metrics["drift"] >= 0


def test_a_checkpoint_within_an_epoch_is_settled(tmp_path):
    module = Module()
    trainer(tmp_path, each_epoch(tmp_path, every=1), max_epochs=1).fit(module, LOADER)
    check = module.anchors.check
    found = []
    for step in (1, 2, 3):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        net = Module()
        net.load_state_dict(saved["state_dict"])
        found.append(float((net.net(check.inputs) - check.reference).square().sum(1).mean()))
        within = saved["optimizer_states"][0]["state"][0]["within"]
        assert torch.equal(within, saved["state_dict"]["net.0.weight"])
    assert max(found) <= MAX_DRIFT * (1 + 1e-4)


class Skips(Module):
    """The same, whose second batch is a broken one."""

    def training_step(self, batch, number):
        return None if number == 1 else super().training_step(batch, number)


def test_a_skipped_batch_moves_nothing_and_accumulated_batches_are_one(tmp_path):
    module = Skips(max_drift=None)
    with pytest.warns(UserWarning, match="training_step` returned `None"):
        trainer(tmp_path, max_epochs=1).fit(module, LOADER)
    assert steps_taken(module.optimizer.state) == 2
    module = Module(max_drift=None)
    trainer(tmp_path, max_epochs=1, accumulate_grad_batches=3).fit(module, LOADER)
    assert steps_taken(module.optimizer.state) == 1


def test_other_optimizers_models_and_clipping_are_refused(tmp_path):
    module = Module()
    before = [p.clone() for p in module.parameters()]
    adam = torch.optim.Adam(module.parameters())
    with pytest.raises(TypeError, match=re.escape("must return one FIPOptimizer, got ['Adam']")):
        trainer(tmp_path).fit(Module(optimizers=[adam]), LOADER)
    other = Module()
    other.configure_optimizers()
    with pytest.raises(ValueError, match="not those of the model that the Trainer trains"):
        trainer(tmp_path).fit(Module(optimizers=[other.optimizer]), LOADER)
    with pytest.raises(ValueError, match="Set gradient_clip_val=0"):
        trainer(tmp_path, gradient_clip_val=1.0).fit(module, LOADER)
    assert all(torch.equal(p, q) for p, q in zip(before, module.parameters(), strict=True))
