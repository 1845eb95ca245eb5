"""For tests of one's own networks: an assertion that a function is kept, and hypothesis strategies.

An invariance test in a pytest suite is a reference, a strategy and :func:`assert_kept`:

    @given(inputs_near(held_out, noise=0.05))
    def test_the_new_network_agrees_with_the_shipped_one(inputs):
        assert_kept(new, shipped, inputs, max_flips=0.02)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fipoptim.anchors.batches import checked_inputs
from fipoptim.anchors.inputs import Inputs, map_inputs
from fipoptim.anchors.output_space import OutputMap, flatten_outputs, predictions, squared_distance
from fipoptim.checks import check_number
from fipoptim.mean import AnchorMean
from fipoptim.optional import import_for
from fipoptim.outputs import compared_outputs

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

SHOWN = 5  # inputs that a failure lists


def assert_kept(
    model: nn.Module,
    reference: nn.Module | Tensor,
    inputs: Any,
    *,
    max_drift: float | None = None,
    max_flips: float | None = None,
    output: str | OutputMap = "logits",
    chunk_size: int = 256,
) -> None:
    """Assert that a network does on ``inputs`` what its reference does.

    Args:
        model: The network.
        reference: The network that it is compared with, or the outputs that it should have, one row an input.
        inputs: The inputs along dimension 0, in any of the forms that :class:`fipoptim.AnchorBatch` takes.
        max_drift: The largest mean of the squared distance of the outputs; None asks nothing of it.
        max_flips: The largest share of inputs whose prediction differs, in [0, 1). With neither budget it is 0.
        output: The space in which outputs are compared.
        chunk_size: Inputs evaluated at a time.

    Raises:
        AssertionError: If a budget does not hold, with the first inputs that break it.
        ValueError: If a budget is out of range, or outputs are not finite or of another shape than the reference's.
    """
    if max_drift is None and max_flips is None:
        max_flips = 0.0
    if max_drift is not None:
        check_number("max_drift", max_drift)
    if max_flips is not None:
        check_number("max_flips", max_flips, below=1.0)
    now, before = compared_outputs(model, reference, checked_inputs(inputs), output, chunk_size)
    count = len(now)
    if max_flips is not None:
        flipped = (predictions(now) != predictions(before)).any(dim=1)
        share = AnchorMean(count).of_each(flipped.double())
        if share > max_flips:
            first = flipped.nonzero().flatten()[:SHOWN].tolist()
            raise AssertionError(
                f"max_flips: {int(flipped.sum())} of {count} predictions differ from the reference's ({share:.3%}), "
                f"{max_flips:.3%} were allowed; the first are of inputs {first}."
            )
    if max_drift is not None:
        distances = squared_distance(flatten_outputs(now, count), flatten_outputs(before, count))
        drift = AnchorMean(count).of_each(distances)
        if not drift <= max_drift:
            largest = distances.topk(min(SHOWN, count)).indices.tolist()
            raise AssertionError(
                f"max_drift: the drift is {drift:.4g}, {max_drift:.4g} was allowed; the outputs of inputs {largest} "
                "differ most."
            )


def inputs_near(
    inputs: Any, *, noise: float = 0.0, shift: int = 0, swaps: int = 0
) -> SearchStrategy[Inputs]:
    """A hypothesis strategy for inputs that differ a little from the given ones.

    Hypothesis draws the size of each change and a seed, so that a failure is repeated and made as small as it can be.

    Args:
        inputs: The inputs along dimension 0: a tensor, or a tuple or dict of tensors.
        noise: The largest change of a number: each entry of a float tensor changes by at most this.
        shift: The largest shift of an image in pixels, down and across: of each float tensor ``(N, C, H, W)``. Zeros
            come in at the border.
        swaps: The most swaps of neighbours in a text: of each tensor of whole numbers ``(N, T)``. All whole tensors of
            one shape, such as tokens and their mask, are swapped alike.

    Raises:
        ImportError: If hypothesis is not installed.
        ValueError: If a size is out of range, or if no change is asked for.
    """
    check_number("noise", noise)
    for name, size in (("shift", shift), ("swaps", swaps)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(f"{name}: must be an integer >= 0, got {size!r}.")
    if noise == 0 and shift == 0 and swaps == 0:
        raise ValueError("inputs_near: give at least one of noise, shift and swaps.")
    st = import_for("draw inputs", "hypothesis.strategies")
    checked = checked_inputs(inputs)

    def changed(sizes: tuple[float, int, int, int, int]) -> Inputs:
        scale, down, across, swapped, seed = sizes

        def change(x: Tensor) -> Tensor:
            seeded = torch.Generator("cpu").manual_seed(seed)
            if x.is_floating_point():
                return _noisy(_shifted(x, down, across), scale, seeded)
            return _swapped(x, swapped, seeded) if x.dim() == 2 else x

        return map_inputs(change, checked)

    strategy: SearchStrategy[Inputs] = st.tuples(
        st.floats(0, noise),
        st.integers(-shift, shift),
        st.integers(-shift, shift),
        st.integers(0, swaps),
        st.integers(0, 2**31 - 1),
    ).map(changed)
    return strategy


def small_networks(
    *, classes: int = 3, convolutional: bool = True
) -> SearchStrategy[tuple[nn.Module, Tensor]]:
    """A hypothesis strategy for small classifiers in eval mode, each with inputs ``(N, ...)`` for it.

    Hypothesis draws the kind (fully connected or convolutional), widths, activation, normalisation and the seed of
    weights and inputs.

    Args:
        classes: The number of outputs.
        convolutional: Whether convolutional networks are among them.

    Raises:
        ImportError: If hypothesis is not installed.
    """
    st = import_for("draw networks", "hypothesis.strategies")

    def built(drawn: tuple[bool, int, type[nn.Module], bool, int, int]) -> tuple[nn.Module, Tensor]:
        images, width, activation, normalised, number, seed = drawn
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            if images:
                layers: list[nn.Module] = [nn.Conv2d(1, width, 3)]
                layers += [nn.BatchNorm2d(width)] if normalised else []
                layers += [activation(), nn.Flatten(), nn.Linear(16 * width, classes)]
                inputs = torch.randn(number, 1, 6, 6)
            else:
                layers = [nn.Linear(4, width)]
                layers += [nn.LayerNorm(width)] if normalised else []
                layers += [activation(), nn.Linear(width, classes)]
                inputs = torch.randn(number, 4)
            return nn.Sequential(*layers).eval(), inputs

    strategy: SearchStrategy[tuple[nn.Module, Tensor]] = st.tuples(
        st.booleans() if convolutional else st.just(False),
        st.integers(1, 8),
        st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU]),
        st.booleans(),
        st.integers(1, 16),
        st.integers(0, 2**31 - 1),
    ).map(built)
    return strategy


def _noisy(x: Tensor, scale: float, seeded: torch.Generator) -> Tensor:
    if scale == 0:
        return x
    signs = 2 * torch.rand(x.shape, generator=seeded, dtype=torch.float64, device="cpu") - 1
    return x + (scale * signs).to(x)


def _shifted(x: Tensor, down: int, across: int) -> Tensor:
    if x.dim() != 4 or (down == 0 and across == 0):
        return x
    height, width = x.shape[2:]
    result = torch.zeros_like(x)
    rows, columns = height - abs(down), width - abs(across)
    if rows > 0 and columns > 0:
        result[..., max(down, 0) :, max(across, 0) :][..., :rows, :columns] = x[
            ..., max(-down, 0) :, max(-across, 0) :
        ][..., :rows, :columns]
    return result


def _swapped(x: Tensor, swaps: int, seeded: torch.Generator) -> Tensor:
    """``x`` ``(N, T)`` with that many pairs of neighbours swapped in every row, at places that are drawn for each."""
    count, length = x.shape
    if length < 2:
        return x
    x = x.clone()
    rows = torch.arange(count, device=x.device)
    for _ in range(swaps):
        place = torch.randint(length - 1, (count,), generator=seeded, device="cpu").to(x.device)
        first, second = x[rows, place].clone(), x[rows, place + 1].clone()
        x[rows, place], x[rows, place + 1] = second, first
    return x
