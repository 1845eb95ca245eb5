"""Runs that a fully sharded network has to take as one process does, and what they leave."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from fipoptim import AnchorBatch, FIPOptimizer, Solver, restore
from fipoptim.shards import local, named_parameters

X = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
OLD = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
WORDS, OLD_WORDS = torch.arange(8 * 3).view(8, 3) % 5, torch.arange(9 * 3).view(9, 3) % 7 % 5
Y = torch.arange(8) % 3
NONE, THREE = Solver(products=0), Solver(products=3)


def network() -> nn.Sequential:
    """Seven rows on two ranks are uneven, and of one row the second rank has nothing."""
    torch.manual_seed(0)
    layers = (nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1), nn.Tanh(), nn.Linear(1, 3))
    return nn.Sequential(*layers).double()


def of_words() -> nn.Sequential:
    """A network with a padding row, and with buffers."""
    torch.manual_seed(0)
    table = nn.Embedding(5, 6, padding_idx=0)
    layers = (table, nn.Flatten(), nn.BatchNorm1d(18), nn.Linear(18, 3))
    return nn.Sequential(*layers).double().eval()


def sharded(model: nn.Sequential, **options: Any) -> nn.Sequential:
    """The network divided among all ranks; the last layer stays with the root."""
    for layer in list(model)[:-1]:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def own(x: torch.Tensor) -> torch.Tensor:
    """The rows of this rank."""
    if not dist.is_initialized():
        return x
    rank, size = dist.get_rank(), dist.get_world_size()
    return x[rank * len(x) // size : (rank + 1) * len(x) // size]


def whole(model: nn.Module) -> list[torch.Tensor]:
    """All weights, gathered for the test."""
    params = named_parameters(model).values()
    return [getattr(p, "full_tensor", p.detach)().detach().clone() for p in params]


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Options of the optimizer; those of anchors under "anchors".
TRAINED: dict[str, dict[str, Any]] = {
    "first order": {"solver": NONE, "momentum": 0.5},
    "first order, adam": {"solver": NONE, "precondition": "adam", "momentum": 0.5},
    "three products": {"solver": THREE, "momentum": 0.5},
    "three products, adam": {"solver": THREE, "precondition": "adam", "momentum": 0.5},
    "adaptive": {"anchors": {"check": 0.3}, "keep_zeros": True},
    "budget": {"precondition": "adam", "max_drift": 0.01, "momentum": 0.5},
    "settled": {"max_drift": 0.002, "max_flips": 0.5, "check_every": None, "beta": 20.0},
    "settled by products": {
        "max_drift": 0.01,
        "check_every": None,
        "precondition": "adam",
        "beta": 20.0,
    },
    "automatic beta": {"beta": "auto", "max_drift": 0.05, "check_every": None, "solver": NONE},
    "draws": {"anchors": {"batch_size": 5}, "solver": THREE},
    "chunks of two": {"anchors": {"chunk_size": 2}, "solver": THREE},
    "chunks of one": {"anchors": {"chunk_size": 1}, "solver": THREE},
    "live reference": {"anchors": {"store": "live"}, "solver": NONE},
    "augmented": {"anchors": {"augment": lambda x: 1.1 * x}, "solver": NONE},
    "words": {"words": True, "solver": THREE, "precondition": "adam"},
}


def trained(name: str, *, divided: bool) -> dict[str, Any]:
    """Three steps of training, and what they leave."""
    options = dict(TRAINED[name])
    words = options.pop("words", False)
    model, x, old = (of_words(), WORDS, OLD_WORDS) if words else (network(), X, OLD)
    model = sharded(model) if divided else model
    how = {"generator": seeded(), "chunk_size": None} | options.pop("anchors", {})
    anchors = AnchorBatch(model, old, **how)
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.1},
        {"params": [p for layer in list(model)[1:] for p in layer.parameters()]},
    ]
    form = None if divided else "double-vjp"
    options = {"beta": 2.0, "eps": 0.2, "form": form, "generator": seeded(4)} | options
    opt = FIPOptimizer(groups, anchors, **options)
    if options.get("keep_zeros"):
        with torch.no_grad():
            local(model[0].bias).zero_()
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(model(own(x)), own(Y)).backward()
        opt.step()
    told = {}
    if options.get("check_every", 1) is None:
        done = opt.settle()
        told = {"products": done.products, "went_back": done.went_back, "within": done.within}
    assert opt.last_step is not None
    effect = opt.last_step.measure()._asdict()
    return {"weights": whole(model), "drift": anchors.drift(), "effect": effect} | told


def onward(*, divided: bool) -> dict[str, Any]:
    """Steps without an objective, from random directions that leave the padding row."""
    model = sharded(of_words()) if divided else of_words()
    opt = FIPOptimizer(
        model.parameters(),
        AnchorBatch(model, OLD_WORDS),
        eps=0.2,
        solver=Solver(products=2),
        form=None if divided else "double-vjp",
        generator=seeded(),
    )
    for _ in range(2):
        opt.step()
    return {"weights": whole(model)}


def by_secondary(*, divided: bool) -> dict[str, Any]:
    """Steps by a secondary objective. Gradients that lie there are left."""
    model = sharded(network()) if divided else network()
    params = list(named_parameters(model).values())
    opt = FIPOptimizer(
        params,
        AnchorBatch(model, OLD),
        secondary=lambda: F.cross_entropy(model(own(X)), own(Y)),
        eps=0.2,
        solver=NONE,
    )
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        opt.step()
    left = all(bool((local(p.grad) == 1).all()) for p in params if p.grad is not None)
    return {"weights": whole(model), "left": left}


class Language(nn.Module):
    """A model of language with a head that is its table, and a layer that is evaluated again in its backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        h = self.table(input_ids)
        h = h + checkpoint(lambda x: torch.tanh(self.layer(x)), h, use_reentrant=False)
        return self.head(h)


def texts(count: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Texts of which the first is shorter."""
    mask = torch.ones(count, length, dtype=torch.long)
    mask[0, -1] = 0
    ids = torch.randint(1, 11, (count, length), generator=seeded(seed)) * mask
    return {"input_ids": ids, "attention_mask": mask}


def of_language(*, divided: bool) -> dict[str, Any]:
    """Steps of a model of language, whose ranks have texts of other lengths."""
    torch.manual_seed(0)
    model = Language().double()
    if divided:
        fully_shard(model.layer)
        fully_shard(model)
    old = [texts(3, 4, 1), texts(2, 7, 2), texts(4, 3, 3)]
    anchors = AnchorBatch(model, old, output="nats_per_token", chunk_size=2)
    opt = FIPOptimizer(
        model.parameters(),
        anchors,
        eps=0.1,
        precondition="adam",
        solver=THREE,
        form=None if divided else "double-vjp",
    )
    batch = texts(8, 5, 9)
    for _ in range(2):
        opt.zero_grad()
        z = model(**{name: own(x) for name, x in batch.items()})
        F.cross_entropy(z.flatten(0, 1), own(batch["input_ids"]).flatten()).backward()
        opt.step()
    return {"weights": whole(model), "drift": anchors.drift()}


def by_closure(*, divided: bool) -> dict[str, Any]:
    """Steps by closures that return a loss, that return None beside a gradient, and that skip their batch."""
    model = sharded(network()) if divided else network()
    opt = FIPOptimizer(model.parameters(), AnchorBatch(model, OLD), eps=0.2, solver=NONE)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(own(X)), own(Y))
        loss.backward()
        return loss

    def without_loss() -> None:
        closure()
        with torch.no_grad():  # the gradient of the first row alone, which one rank has
            for p in list(named_parameters(model).values())[1:]:
                local(p.grad).zero_()
            first = local(next(model.parameters()).grad)
            first[0 if divided and dist.get_rank() == 1 else 1 :] = 0.0

    opt.step(closure)
    opt.step(without_loss)
    moved = whole(model)
    opt.step(lambda: None)
    skipped = all(map(torch.equal, moved, whole(model)))
    return {"weights": moved, "skipped": skipped}


def restored(*, divided: bool) -> dict[str, Any]:
    """A network that has changed, restored."""
    model = sharded(network()) if divided else network()
    anchors = AnchorBatch(model, OLD)
    with torch.no_grad():
        for p in named_parameters(model).values():
            local(p).mul_(1.1)
    done = restore(
        model, anchors, max_drift=anchors.drift() / 10, form=None if divided else "double-vjp"
    )
    return {"weights": whole(model), "drift": done.after.drift, "products": done.products}


def resumable(*, divided: bool, old: torch.Tensor = OLD) -> tuple[nn.Module, FIPOptimizer]:
    """A run that is saved. With ranks its network is divided among them, or copied to each.

    Its anchors are ``old``, and a checkpoint may hold others.
    """
    model: nn.Module = network()
    if dist.is_initialized():
        model = sharded(network()) if divided else nn.parallel.DistributedDataParallel(model)
    anchors = AnchorBatch(model, old, batch_size=6, generator=seeded())
    opt = FIPOptimizer(
        model.parameters(),
        anchors,
        beta=2.0,
        eps=0.2,
        precondition="adam",
        momentum=0.5,
        max_drift=0.5,
        check_every=None,
        solver=NONE,
        generator=seeded(4),
    )
    return model, opt


def steps(model: nn.Module, opt: FIPOptimizer, count: int) -> None:
    """Steps of training."""
    for _ in range(count):
        opt.zero_grad()
        F.cross_entropy(model(own(X)), own(Y)).backward()
        opt.step()


CASES = {
    **{name: (lambda *, divided, name=name: trained(name, divided=divided)) for name in TRAINED},
    "onward": onward,
    "secondary": by_secondary,
    "closure": by_closure,
    "language": of_language,
    "restored": restored,
}
