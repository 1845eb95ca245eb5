"""One rank of test_fsdp.py: ``fsdp_rank.py RESULT two|four CHECKPOINTS``, by gloo on CPUs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from fsdp_cases import CASES, NONE, OLD, X, Y, network, own, resumable, sharded, steps, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fipoptim import AnchorBatch, FIPOptimizer, Solver
from fipoptim.metric import AnchorMetric
from fipoptim.shards import local, named_parameters


def message(work: Callable[[], Any]) -> str:
    """The error that ``work`` raises."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def built(model: nn.Module | None = None, **options: Any) -> FIPOptimizer:
    model = sharded(network()) if model is None else model
    return FIPOptimizer(model.parameters(), AnchorBatch(model, OLD), **options)


def refusals() -> dict[str, str]:
    """What is refused on construction."""
    hybrid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards"))
    mesh = init_device_mesh("cpu", (2,))

    def partly() -> None:
        model = network()
        fully_shard(model[0])
        AnchorBatch(model, OLD)

    def tensor_parallel() -> None:
        layer = parallelize_module(nn.Linear(4, 4).double(), mesh, ColwiseParallel())
        AnchorBatch(layer, OLD)

    def flattened() -> None:  # its constructor asks for a GPU
        layer = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
        nn.Module.__init__(layer)
        AnchorBatch(nn.Sequential(network(), layer), OLD)

    return {
        "in part": message(partly),
        "hybrid": message(lambda: AnchorBatch(sharded(network(), mesh=hybrid), OLD)),
        "tensor parallel": message(tensor_parallel),
        "fsdp1": message(flattened),
        "other group": message(lambda: AnchorBatch(sharded(network()), OLD, process_group=False)),
        "muon": message(lambda: built(precondition="muon")),
        "form": message(lambda: built(form="forward")),
        "compile": message(lambda: built(compile=True)),
        "record": message(lambda: built().record()),
        "dense": message(lambda: AnchorMetric(built().anchors).dense()),
        "diagonal": message(lambda: AnchorMetric(built().anchors).diagonal()),
        "copies": message(lambda: AnchorBatch(sharded(network()), OLD, store="live").state_dict()),
        "networks": message(lambda: AnchorBatch(sharded(network()), OLD, store="live").extend(OLD)),
    }


def in_half_precision() -> dict[str, Any]:
    """A step without products, and the refusal of one with products."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = sharded(network().float(), mp_policy=policy)
    anchors = AnchorBatch(model, OLD.float())
    opt = FIPOptimizer(model.parameters(), anchors, solver=NONE)
    F.cross_entropy(model(own(X).float()), own(Y)).backward()
    opt.step()
    before = whole(model)
    opt.solver = Solver(products=2)
    refused = message(opt.step)
    kept = all(map(torch.equal, before, whole(model)))
    return {"moved": opt.last_step.step_norm, "refused": refused, "kept": kept}


def unharmed() -> dict[str, Any]:
    """What evaluations elsewhere and products leave as it was, and errors too."""
    fails = False

    def output(z: torch.Tensor) -> torch.Tensor:
        if fails:
            raise ArithmeticError("this output")
        return z

    model = sharded(network())
    anchors = AnchorBatch(model, OLD, output=output)
    metric = AnchorMetric(anchors)
    F.cross_entropy(model(own(X)), own(Y)).backward()
    params = list(named_parameters(model).values())
    versions = [local(p)._version for p in params]
    bits, grads = ([local(x).clone() for x in xs] for xs in (params, [p.grad for p in params]))
    v = torch.ones_like(metric.flat.zeros())
    elsewhere = metric.outputs_after(v)
    metric.matvec(v)
    fails = True
    errors = [message(lambda: metric.outputs_after(v)), message(lambda: metric.jvp(v))]
    fails = False
    return {
        "moved": not torch.equal(elsewhere, metric.outputs),
        "errors": errors,
        "weights": all(torch.equal(local(p), b) for p, b in zip(params, bits, strict=True)),
        "gradients": all(torch.equal(local(p.grad), g) for p, g in zip(params, grads, strict=True)),
        "versions": versions == [local(p)._version for p in params],
        "same outputs": torch.equal(metric.outputs_now(), metric.outputs),
    }


def errors_in_steps() -> dict[str, Any]:
    """Steps that every rank refuses."""
    opt = built(solver=NONE)
    model = opt.anchors.model
    F.cross_entropy(model(own(X)), own(Y)).backward()
    before = whole(model)
    if dist.get_rank() == 0:
        local(next(model.parameters()).grad)[0, 0] = torch.nan
    found = {"nan": message(opt.step)}
    opt.zero_grad()
    F.cross_entropy(model(own(X)), own(Y)).backward()
    opt.step()  # moves
    after = whole(model)
    model.set_requires_gradient_sync(False)
    found["no sync"] = message(opt.step)
    model.set_requires_gradient_sync(True)
    found["kept"] = all(map(torch.equal, after, whole(model)))
    found["moved"] = not any(map(torch.equal, before, after))
    p = next(model.parameters())
    part = torch.zeros_like(local(p)) + (torch.inf if dist.get_rank() == 1 else 0.0)
    for name, velocity in (
        ("whole state", torch.zeros(7, 4, dtype=torch.float64)),
        (
            "bad state",
            DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=(4, 1)),
        ),
    ):
        state = opt.state_dict()
        state["state"] = state["state"] | {0: state["state"][0] | {"velocity": velocity}}
        found[name] = message(lambda: opt.load_state_dict(state))  # noqa: B023
    return found


def most_weights_at_once() -> dict[str, int]:
    """The most weights that are whole on this rank at any time in a step with products, and all that it keeps."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8))).double()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    found = 0

    def count(*_: Any) -> None:
        nonlocal found
        present = [p for layer in model for p in layer._parameters.values()]
        found = max(found, sum(p.numel() for p in present if not isinstance(p, DTensor)))

    inputs = torch.randn(4, 16, dtype=torch.float64)
    opt = FIPOptimizer(
        model.parameters(),
        AnchorBatch(model, inputs),
        precondition="adam",
        solver=Solver(products=2),
    )
    for layer in model:
        layer.register_forward_pre_hook(count)
    for _ in range(2):
        model(inputs).square().sum().backward()
        opt.step()
    kept = [x for entries in opt.state.values() for x in entries.values() if x.dim()]
    return {
        "all": sum(p.numel() for p in model.parameters()),
        "a layer": 16 * 17,
        "whole at once": found,
        "divided": all(isinstance(x, DTensor) for x in kept),
        "kept": sum(local(x).numel() for x in kept if local(x).stride(0) != 0),
        "vector": sum(local(p).numel() for p in model.parameters()),
    }


def state_of(model: nn.Module, opt: FIPOptimizer) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, opt)
    return {"model": of_model, "optimizer": of_optimizer, "anchors": opt.anchors}


def resumed(folder: Path, name: str, *, divided: bool) -> tuple[nn.Module, FIPOptimizer]:
    """The run goes on with the anchors of the checkpoint, and not with those that it was built with."""
    model, opt = resumable(divided=divided, old=OLD + 1)
    state = state_of(model, opt)
    dcp.load(state, checkpoint_id=folder / f"{name} {divided}")
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return model, opt


def save(folder: Path, name: str, model: nn.Module, opt: FIPOptimizer, *, divided: bool) -> None:
    dcp.save(state_of(model, opt), checkpoint_id=folder / f"{name} {divided}")


def on_two(folder: Path) -> dict[str, Any]:
    found: dict[Any, Any] = {
        "cases": {name: case(divided=True) for name, case in CASES.items()},
        "refusals": refusals(),
        "half": in_half_precision(),
        "unharmed": unharmed(),
        "errors": errors_in_steps(),
        "memory": most_weights_at_once(),
    }
    for divided in (True, False):
        model, opt = resumable(divided=divided)
        steps(model, opt, 2)
        save(folder, "after 2", model, opt, divided=divided)
        steps(model, opt, 4)
        found["uninterrupted", divided] = whole(model)
        model, opt = resumed(folder, "after 2", divided=divided)
        steps(model, opt, 4)
        found["resumed", divided] = whole(model)
    return found


def on_four(folder: Path) -> dict[str, Any]:
    found = {}
    for divided in (True, False):
        model, opt = resumed(folder, "after 4", divided=divided)
        steps(model, opt, 2)
        found["resumed", divided] = whole(model)
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = {"two": on_two, "four": on_four}[sys.argv[2]](Path(sys.argv[3]))
    torch.save(found, sys.argv[1])
    dist.destroy_process_group()
