"""One of the ranks of ``test_two_ranks``: what each library makes of its part of the batches, by gloo on CPUs.

Every run is resumed, too, on trained weights and with other anchors.
"""

import copy
import os
import sys
from pathlib import Path

import test_accelerate
import test_lightning
import test_transformers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather
from test_accelerate import X, Y
from tiny_texts import Classifier
from torch.utils.data import DataLoader, DistributedSampler
from transformers import Trainer

from fipoptim.integrations.transformers import FIPCallback


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def ranks():
    return int(os.environ.get("WORLD_SIZE", "1"))  # before the library has joined them, too


def transformers(folder):
    """Four steps of the Trainer, settled and saved after each second one; the last two again from a checkpoint."""

    def run(model, seed, folder):
        args = test_transformers.arguments(folder)  # first: anchors look for the other ranks
        args.per_device_train_batch_size = 8 // ranks()
        optimizer = test_transformers.held(model, seed)
        how = {"train_dataset": test_transformers.DATA, "callbacks": [FIPCallback()]}
        return Trainer(model, args, optimizers=(optimizer, None), **how), optimizer

    model, again = Classifier(dropout=0.0), Classifier(dropout=0.0)
    whole, optimizer = run(model, 1, folder)
    whole.train()
    again.load_state_dict(model.state_dict())
    resumed, _ = run(again, 7, folder / "resumed")
    resumed.train(str(folder / "checkpoint-2"))
    return {
        "weights": weights(model),
        "resumed": weights(again),
        "logs": [entry for entry in whole.state.log_history if "loss" in entry],
        "drift": optimizer.anchors.check.drift(),
    }


def accelerate(folder):
    """Four steps on the parts of two batches; the last two again from a state."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    model = test_accelerate.network()
    accelerator, wrapped, optimizer = test_accelerate.prepared(model)
    rank = accelerator.process_index
    batches = [
        (x.chunk(ranks())[rank], y.chunk(ranks())[rank])
        for x, y in zip(X.split(10), Y.split(10), strict=True)
    ]
    loss = F.cross_entropy(model(batches[0][0]), batches[0][1])
    own = gather(torch.autograd.grad(loss, model[0].bias)[0])  # not averaged
    test_accelerate.train(accelerator, wrapped, optimizer, batches)
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    test_accelerate.train(accelerator, wrapped, optimizer, batches)
    again = copy.deepcopy(model)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    resumed = test_accelerate.prepared(again, seed=7)
    resumed[0].load_state(str(folder))
    test_accelerate.train(*resumed, batches)
    return {
        "weights": weights(model),
        "resumed": weights(again),
        "gradients": list(own.split(8)),
        "drift": optimizer.optimizer.anchors.drift(),
    }


def lightning(folder):
    """Two epochs of Lightning, settled after each; the second again from a checkpoint."""
    parallel = {"strategy": "ddp", "devices": 2} if ranks() > 1 else {}
    data = test_lightning.LOADER.dataset
    rank = int(os.environ.get("RANK", "0"))
    sampler = DistributedSampler(data, ranks(), rank, shuffle=False)  # Lightning's own shuffles
    loader = DataLoader(data, batch_size=8 // ranks(), sampler=sampler)
    whole, resumed = test_lightning.Module(), test_lightning.Module(seed=7)
    saved = test_lightning.each_epoch(folder)
    runs = test_lightning.trainer(folder, saved, **parallel)
    runs.fit(whole, loader)
    again = test_lightning.trainer(
        folder / "resumed", test_lightning.each_epoch(folder / "resumed"), **parallel
    )
    again.fit(resumed, loader, ckpt_path=folder / "step=3.ckpt")
    return {
        "weights": weights(whole),
        "resumed": weights(resumed),
        "drift": whole.anchors.check.drift(),
        "logged": float(runs.callback_metrics["drift"]),
    }


RUNS = {run.__name__: run for run in (transformers, accelerate, lightning)}

if __name__ == "__main__":
    out = Path(sys.argv[1])
    chosen = sys.argv[2:] or RUNS
    found = {name: RUNS[name](out / name) for name in chosen}
    torch.save(found, out / f"{dist.get_rank()}.pt")
