"""The processes that ``torchrun`` starts for one run of a recipe. A process alone takes none of these ways.

All processes take the same steps on the same networks. Each evaluates its share of a batch, and gradients are averaged.
Rank 0 alone prints, and reads and writes files.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fipoptim.ranks import Ranks


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that the environment tells of, if there are several, until the ``with`` statement ends.

    What ranks other than 0 print meanwhile is dropped; an error that nobody expects is still shown. Within another such
    statement it joins nothing further.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    joins = not dist.is_initialized()
    if joins:
        dist.init_process_group()  # gloo for CPUs and NCCL for GPUs
    with contextlib.ExitStack() as stack:
        if ranks().rank != 0:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            yield
        except SystemExit:
            # The first process that ends in failure ends the others: rank 0 is to have said why.
            sys.stderr.flush()
            dist.barrier()
            raise
    if joins:
        dist.destroy_process_group()


def ranks() -> Ranks:
    """All processes of this run."""
    return Ranks.of(None)


def device_of(parser: argparse.ArgumentParser, name: str) -> str:
    """The name of this process's device: of several GPUs each process on a machine has its own.

    If there are too few, or one of them is named, the parser ends the program and says why.
    """
    if ranks().alone or not name.startswith("cuda"):
        return name
    if name != "cuda":
        parser.error(
            f"argument --device: with several processes give cuda, not {name}: each has its own GPU"
        )
    here, found = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if found < here:
        parser.error(
            f"argument --device: {here} processes on this machine take as many GPUs, and there are {found}"
        )
    own = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(own)
    return f"cuda:{own}"


def replicated(model: nn.Module) -> nn.Module:
    """The model, with gradients that are means over processes if there are several."""
    return model if ranks().alone else nn.parallel.DistributedDataParallel(model)


def of_first(model: nn.Module) -> nn.Module:
    """The model, with the weights and buffers that it has on rank 0."""
    if ranks().alone:
        return model
    own = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        for tensor, first in zip(own, ranks().of_first(own), strict=True):
            tensor.copy_(first)
    return model


def share(count: int) -> Tensor:
    """The rows, out of ``count``, that this process evaluates."""
    rows = ranks().share(count)
    return torch.arange(rows.start, rows.stop)


def mean(own: Tensor, count: int) -> Tensor:
    """A mean over ``count`` numbers, of which each process has some.

    Each process gets another result. The mean of these over processes, as that of their gradients, is the mean over all
    numbers, even if some processes have more of them than others.
    """
    return own.mean() if ranks().alone else own.sum() * (ranks().size / count)
