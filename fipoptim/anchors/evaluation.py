"""The evaluation of a network: in eval mode and full precision, whatever the caller's mode, autocast and threads."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

# The process, and not a thread, owns the level of forward-mode AD, the switch of the attention fast path, the random
# state and the cache of parametrizations. So one thread evaluates at a time.
_ONE_THREAD = threading.RLock()


def unwrap(model: nn.Module) -> nn.Module:
    """The module that owns the parameters behind DistributedDataParallel, DataParallel or torch.compile."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU if the model has none."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextlib.contextmanager
def evaluation(model: nn.Module, device: torch.device, *, tangents: bool = False) -> Iterator[None]:
    """Evaluate ``model`` in eval mode and without autocast.

    With ``tangents`` attention is computed by the kernel that has a forward-mode derivative and can be differentiated
    twice; otherwise by the one that torch prefers, as outside of this context.

    Autocast that Accelerate has put into ``model.forward`` is left out as well, and so are the hooks of
    ``replicate()``, which would take this for a step of training.

    The random state is forked: the training loop does not notice what the model draws. Inference mode is left, because
    its tensors have no derivative. So is ``parametrize.cached()``, which would hand out weights of before a step.
    Everything is put back afterwards. Threads take turns.
    """
    with (
        _ONE_THREAD,
        torch.inference_mode(False),
        _without_cached_weights(),
        _own_forward(model),
        _without_replicate(model),
        _eval_mode(model, device),
        sdpa_kernel(SDPBackend.MATH) if tangents else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from torch's random state of ``seed``, and put the state of before back afterwards. Threads take turns."""
    with _ONE_THREAD, _forked_random_state(device):
        torch.manual_seed(seed)
        yield


def _forked_random_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextlib.contextmanager
def _without_cached_weights() -> Iterator[None]:
    """Parametrized weights are computed from the parameters at each access, as outside of ``parametrize.cached()``."""
    enabled, cache = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = enabled, cache


@contextlib.contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Accelerate replaces the ``forward`` of a model by one under autocast, and keeps the original beside it."""
    replaced = [
        (module.__dict__, module.__dict__["forward"])
        for module in model.modules()
        if module.__dict__.keys() >= {"forward", "_original_forward"}
    ]
    try:
        for attributes, _ in replaced:
            attributes["forward"] = attributes["_original_forward"]
        yield
    finally:
        for attributes, forward in replaced:
            attributes["forward"] = forward


@contextlib.contextmanager
def _without_replicate(model: nn.Module) -> Iterator[None]:
    """``torch.distributed._composable.replicate`` prepares in forward hooks for the backward pass of a step."""

    def is_its_own(hook: Any) -> bool:
        kind = type(getattr(hook, "__self__", None))
        return kind.__module__ == "torch.distributed._composable.replicate"

    replaced = [
        (hooks, dict(hooks))
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        if any(map(is_its_own, hooks.values()))
    ]
    try:
        for hooks, before in replaced:
            for number, hook in before.items():
                if is_its_own(hook):
                    del hooks[number]
        yield
    finally:
        for hooks, before in replaced:  # in the order of before
            hooks.clear()
            hooks.update(before)


@contextlib.contextmanager
def _eval_mode(model: nn.Module, device: torch.device) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    # The fused encoder layer pads its outputs otherwise than the layers that can be differentiated.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_forked_random_state(device))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        try:
            # Set the flag rather than call eval(), which models override with side effects.
            for module in training:
                module.training = False
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for module in training:
                module.training = True
