"""Ranks that train, of which one is killed in the middle of a step; rank 0 has saved a checkpoint before."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
from modes import Run
from rank import Rank
from torch import nn

from fipoptim import Solver

OPTIONS: dict[str, Any] = {
    "solver": Solver(products=0),
    "anchors": {"batch_size": 16},
    "precondition": "adam",
    "momentum": 0.5,
}
SAVED, DIES, LAST = 4, 7, 12


def die(module: nn.Module, args: Any) -> None:
    if not module.training:  # anchors are evaluated
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    rank = Rank()
    rank.join()
    run = Run(rank, **OPTIONS)
    for k in range(LAST):
        if k == SAVED and rank.number == 0:
            state = {
                "model": run.model.state_dict(),
                "optimizer": run.optimizer.state_dict(),
                "anchors": run.anchors.state_dict(),
            }
            torch.save(state, sys.argv[1])
        if k == DIES and rank.number == 1:
            run.model.register_forward_pre_hook(die)
        run.step(k)
    rank.end()


if __name__ == "__main__":
    main()
