"""Learn new classes on two processes, within a budget: torchrun --nproc-per-node 2 docs/examples/ddp.py."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fipoptim import AnchorBatch, FIPOptimizer

dist.init_process_group()  # before the anchors are built
rank, ranks = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))  # the network that you ship
old_inputs = torch.randn(64, 4)  # every rank gives all anchors; each evaluates its share
x, y = torch.randn(48, 4), torch.arange(48) % 3

called = DistributedDataParallel(model)
anchors = AnchorBatch(model, old_inputs, check=0.25)
opt = FIPOptimizer(model.parameters(), anchors, beta=10.0, eps=0.1, max_drift=0.05)

own = slice(rank * 48 // ranks, (rank + 1) * 48 // ranks)  # a DistributedSampler does this
for _ in range(10):
    opt.zero_grad()
    F.cross_entropy(called(x[own]), y[own]).backward()
    opt.step()

drift = anchors.check.drift()  # on every rank, as every measurement is
if rank == 0:
    print(f"drift {drift:.3g} of 0.05 after 10 steps on {ranks} ranks")
assert drift <= 0.05
dist.destroy_process_group()
