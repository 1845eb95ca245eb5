"""Shard a network by FSDP2, save it on the way and go on: torchrun --nproc-per-node 2 docs/examples/fsdp.py."""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from fipoptim import AnchorBatch, FIPOptimizer, Solver

dist.init_process_group()
rank, ranks = dist.get_rank(), dist.get_world_size()
x, y = torch.randn(48, 4, generator=torch.Generator().manual_seed(1)), torch.arange(48) % 3
old_inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(2))
own = slice(rank * 48 // ranks, (rank + 1) * 48 // ranks)


def build():
    """Everything as it is before the first step, or before a checkpoint is loaded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    anchors = AnchorBatch(model, old_inputs)
    opt = FIPOptimizer(
        model.parameters(),
        anchors,
        beta=5.0,
        eps=0.1,
        precondition="adam",
        solver=Solver(products=0),
    )
    return model, anchors, opt


def train(model, opt, steps):
    """Each rank takes its share of the batch; FSDP averages the gradients."""
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(x[own]), y[own]).backward()
        opt.step()


def state_of(model, anchors, opt):
    """What a resumed run needs; torch.distributed.checkpoint reads and writes it in place."""
    of_model, of_optimizer = get_state_dict(model, opt)
    return {"model": of_model, "optimizer": of_optimizer, "anchors": anchors}


folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)  # the ranks write into one folder
model, anchors, opt = build()
train(model, opt, 5)
dcp.save(state_of(model, anchors, opt), checkpoint_id=folder[0])
train(model, opt, 5)
drift = anchors.drift()

model, anchors, opt = build()  # in another job, perhaps on another number of ranks
state = state_of(model, anchors, opt)
dcp.load(state, checkpoint_id=folder[0])
set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
train(model, opt, 5)
assert anchors.drift() == drift
if rank == 0:
    print(f"drift {drift:.3g} after 10 steps on {ranks} ranks, and again after resuming at 5")
dist.destroy_process_group()
