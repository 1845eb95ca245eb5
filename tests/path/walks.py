"""Helpers for the tests of a path: networks and an optimizer to record, and a disk that fails on demand."""

import copy
import errno
import math
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from fipoptim.path.record import FIPPath


class TiedNet(nn.Module):
    """Tied weights, buffers (one of them not persistent), a scalar parameter, and a frozen one."""

    def __init__(self, width=6):
        super().__init__()
        self.embed = nn.Linear(5, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)
        self.back = nn.Linear(width, 5, bias=False)
        self.back.weight = nn.Parameter(self.embed.weight.detach().T.contiguous())
        self.again = nn.Linear(5, width, bias=False)
        self.again.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("mask", torch.ones(width), persistent=False)

    def forward(self, x):
        h = self.drop(self.norm(self.embed(x))) * self.mask
        return self.scale * self.back(h + self.again(x))


class Follower(torch.optim.SGD):
    """Stands in for FIPOptimizer: gradient descent with the attributes that a path reads."""

    def __init__(self, model, lr=0.1):
        super().__init__([p for p in model.parameters() if p.requires_grad], lr=lr)
        self.anchors = SimpleNamespace(model=model, drift=lambda: 0.0)
        self.last_step = SimpleNamespace(drift=0.0)
        # This is a hook because torch runs the hooks twice if a step calls its parent's step.
        self.register_step_post_hook(self.report)

    def report(self, *_):
        self.last_step = SimpleNamespace(drift=self.last_step.drift + 0.5)


def make(seed=0, net=TiedNet):
    torch.manual_seed(seed)
    model = net()
    return model, Follower(model)


def walk(model, optimizer, steps):
    """Train, and return the state after every step, beginning with the one before the first."""
    states = [copy.deepcopy(model.state_dict())]
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()
        states.append(copy.deepcopy(model.state_dict()))
    return states


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def euclidean(a, b, model):
    names = [name for name, _ in model.named_parameters()]
    return math.sqrt(sum(float((a[n] - b[n]).double().square().sum()) for n in names))


def assert_holds(folder, states, steps):
    """Asserts that the folder opens and holds the networks of ``steps``."""
    path = FIPPath.open(folder)
    assert path.steps == steps
    for state, step in zip(path, steps, strict=True):
        assert_same(state, states[step])
    return path


WRITES = [
    ("save_file", "network-"),
    ("replace", "network-"),
    ("write_text", "index.json"),
    ("replace", "index.json"),
]


class Disk:
    """Stands between a path and its files. It fails at chosen writes, or calls a function at each of them."""

    CALLS = ("save_file", "write_text", "replace", "unlink")

    def __init__(self, monkeypatch):
        import safetensors.torch

        self.before = lambda call, file: None  # this may raise
        self.after = lambda call, file: None
        for owner, call in (
            (safetensors.torch, "save_file"),
            (Path, "write_text"),
            (os, "replace"),
            (Path, "unlink"),
        ):
            monkeypatch.setattr(owner, call, self.wrapped(call, getattr(owner, call)))

    def wrapped(self, call, real):
        def function(*args, **keywords):
            file = Path(args[1] if call in ("save_file", "replace") else args[0])
            self.before(call, file)
            result = real(*args, **keywords)
            self.after(call, file)
            return result

        return function

    def fail(self, call, file, error=None):
        """Raise ``error`` at ``call`` for files whose name begins with ``file``; a full disk if None."""

        def before(now, at):
            if now == call and at.name.startswith(file):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if error is None else error

        self.before = before

    def repair(self):
        self.before = lambda call, file: None
