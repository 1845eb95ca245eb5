"""What a run is given, and what it is measured on: inputs with labels, and inputs without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.common import processes
from recipes.finetune.outputs import MASK, Inputs, Part

AT_ONCE = 32  # inputs evaluated at a time
IGNORED = -100  # the label of a position without a label


@dataclass(frozen=True)
class Examples:
    """Inputs with labels.

    Attributes:
        inputs: The inputs.
        labels: The classes, ``(N,)``, or one at each of T positions, ``(N, T)``, with -100 where there is none.
    """

    inputs: Inputs
    labels: Tensor

    def __len__(self) -> int:
        """The number of inputs."""
        return len(self.labels)

    def at(self, index: Tensor) -> Examples:
        """The examples at ``index``, without columns that hold padding alone."""
        inputs = chosen(self.inputs, index)
        labels = self.labels[index]
        return Examples(inputs, labels if labels.dim() == 1 else labels[:, : inputs[MASK].shape[1]])


@dataclass(frozen=True)
class Case:
    """What a method is given.

    Attributes:
        start: The pretrained network with its new outputs, in eval mode, in which it is trained, too. It is left as it
            is. Only parameters that require a gradient are trained.
        train: The new examples.
        anchors: Inputs without labels, whose outputs are to stay.
        check: Further ones, on which the budget counts.
        output: The output space in which drift is measured.
    """

    start: nn.Module
    train: Examples
    anchors: Inputs
    check: Inputs
    output: Part


@dataclass(frozen=True)
class Unseen:
    """Inputs that no method is given.

    Attributes:
        test: New examples.
        queries: Inputs without labels, neither anchors nor check inputs.
        predictions: Gives scores from the outputs that are held; the largest is the prediction that should stay.
        kept: What a prediction that has stayed is called in tables.
    """

    test: Examples
    queries: Inputs
    predictions: nn.Module
    kept: str


def chosen(inputs: Inputs, index: Tensor) -> dict[str, Tensor]:
    """The inputs at ``index``; texts without columns that hold padding alone."""
    found = {name: x[index] for name, x in inputs.items()}
    if MASK in found:
        longest = int(found[MASK].sum(dim=1).max())
        found = {name: x[:, :longest] for name, x in found.items()}
    return found


def count(inputs: Inputs) -> int:
    """The number of inputs."""
    return len(next(iter(inputs.values())))


@torch.no_grad()
def evaluated(model: nn.Module, inputs: Inputs, part: Part) -> Tensor:
    """A part of the outputs of all inputs, some inputs at a time; the network must be in eval mode."""
    rows = torch.arange(count(inputs)).split(AT_ONCE)
    found = list[Tensor]()
    for some in rows:
        batch = chosen(inputs, some)
        found.append(part(model(**batch), batch))
    longest = max((z.shape[1] for z in found), default=0)
    if found[0].dim() == 3:  # one row a token: padding is 0
        found = [F.pad(z, (0, 0, 0, longest - z.shape[1])) for z in found]
    return torch.cat(found)


def loss(model: nn.Module, batch: Examples, reduction: str = "mean") -> Tensor:
    """The mean cross-entropy in nats, over examples or over positions with a label.

    Args:
        model: The network.
        batch: The examples.
        reduction: ``"mean"``; or ``"none"``, which gives one number each, 0 where there is no label.
    """
    return F.cross_entropy(
        model(**batch.inputs).learnt.movedim(-1, 1),
        batch.labels,
        ignore_index=IGNORED,
        reduction=reduction,
    )


def shared_loss(model: nn.Module, batch: Examples) -> Tensor:
    """The part of a batch's loss that this process has; the mean over processes is the loss of the whole batch."""
    if processes.ranks().alone:
        return loss(model, batch)
    own = batch.at(processes.share(len(batch)))
    labelled = int((batch.labels != IGNORED).sum())
    return processes.mean(loss(model, own, reduction="none"), labelled)


def batches(examples: Examples, batch_size: int, seed: int) -> Iterator[Examples]:
    """Shuffled batches without an end; what does not fill a batch is left out of a pass."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, len(examples))
    while True:
        order = torch.randperm(len(examples), generator=generator)
        for rows in order[: len(order) // size * size].split(size):
            yield examples.at(rows)
