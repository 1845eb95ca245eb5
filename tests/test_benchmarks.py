"""The benchmarks measure what they say, on the smallest case."""

from __future__ import annotations

import pytest
import torch

from benchmarks import products, steps
from benchmarks.cases import CASES

CPU = torch.device("cpu")
SMALLEST = CASES[0]


@pytest.mark.parametrize("name", [steps.DEFAULT, steps.NAMES[4]])
def test_every_part_of_a_step_is_timed(name: str) -> None:
    loop = steps.Loop(name, *SMALLEST.make(0, CPU), bf16=False)
    seconds = steps.seconds_of_parts(loop, rounds=2)
    assert list(seconds) == list(steps.PARTS)
    whole = seconds.pop("step, all")
    with_products = name != steps.DEFAULT
    for part, duration in seconds.items():
        # At the benchmark's large beta the default takes no products, but it tries the step without them.
        taken = with_products or part not in ("minimise, tangents", "minimise, products")
        assert (duration > 0) == taken, part
        assert duration <= whole


def test_a_step_is_measured_beside_adam() -> None:
    found = steps.measure(SMALLEST, rounds=1, seed=0, device=CPU)
    assert list(found["rows"]) == list(found["peak_bytes"]) == list(steps.NAMES)
    assert found["rows"][steps.ADAM]["ratio"] == 1.0
    assert all(row["seconds"] > 0 for row in found["rows"].values())


def test_a_product_is_measured_beside_other_ways() -> None:
    found = products.measure(SMALLEST, rounds=1, seed=0, device=CPU, compiled=False)
    assert products.BASE in found["rows"]
    assert products.WAYS[0] in found["rows"]
