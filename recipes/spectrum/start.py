"""What all measurements of a seed begin with: networks, anchors, and a task that has not been learnt yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fipoptim import AnchorBatch, AnchorMetric

Loss = Callable[[nn.Module], Tensor]
EIGENVECTOR_TOL = 1e-3  # the residual of eigenvectors, relative to the largest eigenvalue


def cross_entropy(inputs: Tensor, labels: Tensor) -> Loss:
    """The loss of a network on these inputs."""
    return lambda network: F.cross_entropy(network(inputs), labels)


@dataclass(frozen=True)
class NewTask:
    """A task that the network has not learnt.

    Attributes:
        title: What it is called in tables.
        whole: The loss on a fixed set of its inputs, whose gradient is looked at.
        losses: The losses of minibatches, without an end, for the steps of a path.
    """

    title: str
    whole: Loss
    losses: Callable[[], Iterator[Loss]]


@dataclass(frozen=True)
class Start:
    """What all measurements of a seed begin with. Networks are in eval mode and left as they are.

    Attributes:
        networks: The network before and after training, by what they are called.
        at: The name of the one that the new task finds.
        inputs: The anchors.
        output: Their output space.
        chunk_size: Anchors that are evaluated at a time; None is all.
        named: Gives the parameters of a network of which the metric is taken, by name.
        new: The new task.
        top: The number of leading eigenvectors that span the sensitive subspace.
        trace: Whether the derivative is traced: products are faster then, and the trace of a deep network takes long.
    """

    networks: Mapping[str, nn.Module]
    at: str
    inputs: Any
    output: Any
    chunk_size: int | None
    named: Callable[[nn.Module], dict[str, nn.Parameter]]
    new: NewTask
    top: int
    trace: bool = True

    def anchors(self, model: nn.Module) -> AnchorBatch:
        """The anchors of a network, with its outputs of now as the reference."""
        return AnchorBatch(model, self.inputs, output=self.output, chunk_size=self.chunk_size)

    def metric(
        self, model: nn.Module, params: Sequence[nn.Parameter] | None = None, **how: Any
    ) -> AnchorMetric:
        """The metric of a network, over all its parameters or some."""
        chosen = list(self.named(model).values()) if params is None else list(params)
        return AnchorMetric(self.anchors(model), chosen, **{"trace": self.trace, **how})

    @property
    def network(self) -> nn.Module:
        """The network that the new task finds."""
        return self.networks[self.at]

    @cached_property
    def metric_there(self) -> AnchorMetric:
        """Its metric."""
        return self.metric(self.network)

    @cached_property
    def subspace(self) -> tuple[Tensor, Tensor]:
        """Its leading eigenvalues, descending, ``(k,)``, and eigenvectors ``(k, n)``: the sensitive subspace."""
        metric = self.metric_there
        return metric.eigenvectors(min(self.top, metric.size), tol=EIGENVECTOR_TOL)

    @cached_property
    def gradient(self) -> Tensor:
        """The gradient of the new task's loss there, flat, shape ``(n,)``."""
        params = list(self.named(self.network).values())
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.new.whole(self.network), params)
        return self.metric_there.flatten(gradients)
