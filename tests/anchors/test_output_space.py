"""The probability space against closed forms, one logit as two classes, and the definition of a prediction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer
from fipoptim.anchors.output_space import classes_last, predictions, probabilities


class Shaped(nn.Module):
    """A linear model whose outputs are given a shape."""

    def __init__(self, outputs: int, *shape: int, key: str | None = None) -> None:
        super().__init__()
        self.linear, self.shape, self.key = nn.Linear(4, outputs).double(), shape, key

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x).reshape(len(x), *self.shape)
        return {self.key: y} if self.key else y


def fisher(model: Shaped, x: Tensor) -> Tensor:
    """The mean Fisher information of independent two-class predictions of a linear model, dense."""
    z = model.linear(x).detach()
    variance = torch.sigmoid(z) * torch.sigmoid(-z)
    ones = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    outputs, total = z.shape[1], []
    for x_i, variances in zip(ones, variance, strict=True):
        g = torch.zeros(outputs * 5, outputs * 5, dtype=torch.float64)
        for k, factor in enumerate(variances):
            at = torch.cat([4 * k + torch.arange(4), torch.tensor([4 * outputs + k])])
            g[at.unsqueeze(1), at] = factor * torch.outer(x_i, x_i)
        total.append(g)
    return torch.stack(total).mean(dim=0)


SHAPES: dict[str, tuple[int, tuple[int, ...], str | None]] = {
    "column": (1, (1,), None),
    "squeezed": (1, (), None),
    "tokens": (3, (3, 1), None),
    "pixels": (6, (1, 2, 3), None),
    "dict": (1, (1,), "logits"),
}


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("form", ["forward", "double-vjp"])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_one_logit_has_the_fisher_metric_of_two_classes(name: str, form: str, trace: bool) -> None:
    torch.manual_seed(0)
    outputs, shape, key = SHAPES[name]
    model, x = Shaped(outputs, *shape, key=key), torch.randn(6, 4, dtype=torch.float64)
    anchors = AnchorBatch(model, x, output="probabilities")
    metric = AnchorMetric(anchors, form=form, trace=trace)
    torch.testing.assert_close(metric.dense(), fisher(model, x), rtol=1e-9, atol=1e-12)
    p = torch.sigmoid(model.linear(x).detach())
    expected = 2 * torch.stack([1 - p, p], dim=-1).sqrt().reshape(6, -1)
    torch.testing.assert_close(anchors.reference, expected)
    with torch.no_grad():
        for q in model.parameters():
            q.neg_()
    assert anchors.predictions_kept() == 0.0
    flipped = (expected.reshape(6, -1, 2).flip(-1) - expected.reshape(6, -1, 2)).square()
    assert anchors.drift() == pytest.approx(float(flipped.sum() / 6))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", [0.0, 1.0, 10.0, 30.0, 60.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_derivative_is_exact_where_a_class_is_nearly_certain(
    sign: float, size: float, dtype: torch.dtype, tolerance: float
) -> None:
    logit = torch.tensor([[sign * size]], dtype=dtype)
    p = torch.sigmoid(torch.tensor(sign * size, dtype=torch.float64))
    q = torch.sigmoid(torch.tensor(-sign * size, dtype=torch.float64))
    expected = torch.stack([-p * q.sqrt(), q * p.sqrt()])
    for logits in (logit, torch.cat([torch.zeros_like(logit), logit], dim=1)):
        for take in (torch.func.jacfwd, torch.func.jacrev):
            jac = take(probabilities)(logits).reshape(2, -1)
            torch.testing.assert_close(
                jac[:, -1].double(), expected, rtol=tolerance, atol=float(torch.finfo(dtype).tiny)
            )
            if jac.shape[1] == 2:  # a shift of both logits changes nothing
                torch.testing.assert_close(
                    jac[:, 0].double(), -expected, rtol=tolerance, atol=torch.finfo(dtype).tiny
                )


@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 3), (5, 3, 2, 2), (5, 3, 2, 2, 2)])
def test_the_class_dimension_is_second_for_images_and_last_for_tokens(
    shape: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(shape, dtype=torch.float64)
    dim = 1 if len(shape) > 3 else -1
    z = probabilities(logits)
    expected = 2 * torch.softmax(logits, dim=dim).sqrt()
    assert z.shape == (5, logits.numel() // 15, 3)
    torch.testing.assert_close(z, classes_last(expected))
    # Each prediction's squares sum to 4, the square of the sphere's radius.
    torch.testing.assert_close(z.square().sum(dim=-1), torch.full(z.shape[:2], 4.0).double())
    assert torch.equal(predictions(logits), logits.argmax(dim=dim).reshape(5, -1))
    assert torch.equal(predictions(z), predictions(logits))


def test_half_precision_logits_are_compared_in_float32() -> None:
    logits = torch.randn(5, 3).bfloat16()
    assert torch.equal(probabilities(logits), probabilities(logits.float()))


@pytest.mark.parametrize("output", [torch.arange(5), torch.tensor(1.0)])
def test_outputs_that_are_not_one_row_of_floats_per_anchor_are_refused(output: Tensor) -> None:
    model = Shaped(1, 1)
    model.forward = lambda x: output  # type: ignore[method-assign]
    for space in ("logits", "probabilities"):
        with pytest.raises((TypeError, ValueError), match="^model: its output must"):
            AnchorBatch(model, torch.randn(5, 4, dtype=torch.float64), output=space)


# --- predictions ----------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A model whose weight is its output."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = nn.Parameter(z.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.z[x]


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("output", ["logits", "probabilities", lambda y: 3 * y])
@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ([[1.0], [-1.0], [2.0], [-2.0]], [[0.1], [0.1], [-0.1], [-3.0]], 0.5),
        ([1.0, -1.0, 2.0, -2.0], [0.1, 0.1, -0.1, -3.0], 0.5),
        # Each anchor has two positions. The last anchor changes its prediction with the smaller output.
        (
            [[[9.0, 0.0], [0.0, 1.0]]] * 4,
            [[[9.0, 0.0], [0.0, 1.0]]] * 3 + [[[9.0, 0.0], [1.0, 0.0]]],
            3 / 4,
        ),
        # The first class is predicted if scores are equal.
        ([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]], [[2.0, 2.0]] * 4, 3 / 4),
        ([[0.0]] * 4, [[0.0], [-1.0], [-2.0], [1.0]], 3 / 4),
        # Maps of two classes and two pixels.
        (
            [[[[1.0, 0.0]], [[0.0, 1.0]]]] * 4,
            [[[[1.0, 0.0]], [[2.0, 1.0]]]] + [[[[1.0, 0.0]], [[0.0, 1.0]]]] * 3,
            3 / 4,
        ),
    ],
)
def test_predictions_kept_is_the_share_of_anchors_with_unchanged_predictions(
    before: list[Any], after: list[Any], kept: float, output: Any, chunk_size: int | None
) -> None:
    model = Fixed(torch.tensor(before))
    anchors = AnchorBatch(model, torch.arange(4), output=output, chunk_size=chunk_size)
    assert anchors.predictions_kept() == 1.0
    with torch.no_grad():
        model.z.copy_(torch.tensor(after))
    assert anchors.predictions_kept() == kept


def test_a_budget_holds_a_classifier_of_one_logit() -> None:
    torch.manual_seed(0)
    model, x = Shaped(1, 1), torch.randn(20, 4, dtype=torch.float64)
    before = torch.sigmoid(model(x)).detach()
    anchors = AnchorBatch(model, x, output="probabilities")
    opt = FIPOptimizer(model.parameters(), anchors, eps=0.3, beta=100.0, max_drift=0.01)
    for _ in range(10):
        opt.zero_grad()
        ((before < 0.5).double() - model(x)).square().mean().backward()
        opt.step()
    after = torch.sigmoid(model(x)).detach()
    two = lambda p: 2 * torch.cat([1 - p, p], dim=1).sqrt()  # noqa: E731
    drift = (two(after) - two(before)).square().sum(dim=1).mean()
    assert 0 < float(drift) <= 0.01
    assert anchors.drift() == pytest.approx(float(drift))
    same = ((after > 0.5) == (before > 0.5)).double().mean()
    assert anchors.predictions_kept() == pytest.approx(float(same))
