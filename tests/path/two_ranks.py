"""One of the ranks of ``test_path_ranks``: the paths that it records, and the errors that it sees."""

import errno
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fipoptim import AnchorBatch, FIPOptimizer, FIPPath
from fipoptim.path.folder import PathFolder

STEPS = 5


def optimizer():
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 3), nn.Tanh()))
    anchors = AnchorBatch(model, torch.randn(9, 4), batch_size=4)
    return model, FIPOptimizer(model.parameters(), anchors, beta=5.0, eps=0.1)


def train(model, opt):
    generator = torch.Generator().manual_seed(dist.get_rank())  # other batches on each rank
    for _ in range(STEPS):
        opt.zero_grad()
        model(torch.randn(6, 4, generator=generator)).square().mean().backward()
        opt.step()


def told(path):
    return {"steps": path.steps, "drifts": path.drifts, "length": path.length()}


def error_of(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def whole(folder):
    """A path in a folder and one in memory of the same steps, and what this rank can read."""
    model, opt = optimizer()
    with opt.record(every=2, folder=folder) as path, opt.record(every=2) as kept:
        train(model, opt)
    return {
        "folder": told(path),
        "memory": told(kept),
        "networks": list(kept),
        "read": error_of(lambda: path.load_into(opt.anchors.model, -1)),
        "principal": error_of(path.pca),
        "again": error_of(lambda: opt.record(folder=folder)),
        "differs": error_of(lambda: opt.record(every=1 + dist.get_rank())),
        "opened": [error_of(lambda: FIPPath.open(folder).load_into(opt.anchors.model, 1))],
    }


def full_disk(folder):
    """The networks that are missing if a disk is full at one of them, which only rank 0 sees."""
    model, opt = optimizer()
    write = PathFolder.write_network

    def failing(self, i, state):
        assert dist.get_rank() == 0
        if i == 2 and not failed:
            failed.append(i)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, i, state)

    failed, PathFolder.write_network = [], failing
    path = opt.record(folder=folder)

    def recorded():
        with path:
            train(model, opt)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = error_of(recorded)
    PathFolder.write_network = write
    said = [str(w.message) for w in caught if "could not be recorded" in str(w.message)]
    return {"error": error, "missed": path.missed, "warned": len(said), **told(path)}


def interrupted(folder):
    """A run that one rank alone gives up, while the other is at the end of its steps."""
    model, opt = optimizer()
    path = opt.record(every=2, folder=folder)

    def recorded():
        with path:
            train(model, opt)
            if dist.get_rank() == 1:
                raise KeyError("of rank 1")
            raise ValueError("of rank 0")

    return {"error": error_of(recorded), **told(path)}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    out = Path(sys.argv[1])
    found = {run.__name__: run(out / run.__name__) for run in (whole, full_disk, interrupted)}
    torch.save(found, out / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
