"""Seeds of random draws: functions of a run's seed and of the step's number, so that a resumed run repeats them."""

from __future__ import annotations

import torch
from torch import Generator


def draw_seed(generator: Generator | None) -> int:
    """A seed drawn from ``generator``, which moves on; None gives torch's own seed, and nothing moves."""
    if generator is None:
        return torch.initial_seed() % 2**63
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def seed_of_step(seed: int, step: int) -> int:
    """The seed of the draws of step number ``step`` in a run with this ``seed``."""
    return (seed * 1_000_003 + step) % 2**63
