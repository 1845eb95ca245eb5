"""One of two ranks that train the network of test_accelerate.py, each on half of the batch, by gloo on CPUs."""

import sys

import torch
import torch.nn.functional as F
from accelerate.utils import gather
from test_accelerate import X, Y, network, prepared

model = network()
accelerator, wrapped, optimizer = prepared(model)
half = slice(10 * accelerator.process_index, 10 * (accelerator.process_index + 1))
loss = F.cross_entropy(model(X[half]), Y[half])
own = torch.autograd.grad(loss, model[0].bias)[0]  # not averaged
differs = not torch.equal(*gather(own).split(8))
for _ in range(2):
    optimizer.zero_grad()
    accelerator.backward(F.cross_entropy(wrapped(X[half]), Y[half]))
    optimizer.step()
weights = [p.detach() for p in model.parameters()]
torch.save({"weights": weights, "gradient_differs": differs}, sys.argv[1])
accelerator.end_training()
