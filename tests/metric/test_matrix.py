"""The matrix of the metric, its diagonal and its spectrum against an independent Jacobian."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cases import TOGETHER, all_cases, build
from torch import Tensor, nn

from fipoptim import AnchorBatch, AnchorMetric
from fipoptim.anchors.draws import draw_seed


def params_of(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@functools.cache
def metric_and_jacobian(name: str) -> tuple[AnchorMetric, np.ndarray]:
    """The metric of a case and its Jacobian. No test moves a weight, so all of them share one trace."""
    case = build(name)
    jac = oracle.jacobian(case.model, case.inputs, "logits", params_of(case.model))
    return AnchorMetric(AnchorBatch(case.model, case.inputs)), jac


@all_cases
def test_the_matrix_its_diagonal_and_its_spectrum_equal_the_dense_ones(name: str) -> None:
    metric, jac = metric_and_jacobian(name)
    g = oracle.metric(jac)
    np.testing.assert_allclose(metric.dense().numpy(), g, rtol=1e-9, atol=1e-12)
    if name in TOGETHER:
        with pytest.raises(ValueError, match="probes: .* depend on the others"):
            metric.diagonal()
        estimate = metric.diagonal(1000, generator=torch.Generator().manual_seed(0)).numpy()
        np.testing.assert_allclose(estimate, np.diag(g), rtol=0.2, atol=1e-12)
    else:
        np.testing.assert_allclose(metric.diagonal().numpy(), np.diag(g), rtol=1e-9, atol=1e-12)
    largest = np.linalg.eigvalsh(g)[::-1][:5]
    np.testing.assert_allclose(metric.spectrum(5, tol=1e-9).numpy(), largest, rtol=1e-6, atol=1e-9)


def check_spectrum(model: nn.Module, inputs: Any, tol: float, params: Any = None) -> None:
    """Spectra of several lengths, up to all eigenvalues, against the dense decomposition."""
    metric = AnchorMetric(AnchorBatch(model, inputs), params)
    compare_spectra(metric, oracle.jacobian(model, inputs, "logits", metric.params), tol)


def compare_spectra(metric: AnchorMetric, jac: np.ndarray, tol: float) -> None:
    g = oracle.metric(jac)
    every = np.maximum(np.linalg.eigvalsh(g)[::-1], 0)
    for k in sorted({1, 2, 3, 6, min(10, metric.size), metric.size}):
        values = metric.spectrum(k)
        assert values.dtype == torch.float64
        np.testing.assert_allclose(values.numpy(), every[:k], rtol=0, atol=tol * every[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@all_cases
def test_the_spectrum_holds_each_eigenvalue_as_often_as_it_occurs(
    name: str, dtype: torch.dtype
) -> None:
    if dtype == torch.float64:
        compare_spectra(*metric_and_jacobian(name), 1e-5)
    else:
        case = build(name, dtype)
        check_spectrum(case.model, case.inputs, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("anchors", [2, 30])
def test_a_linear_layer_has_each_eigenvalue_once_for_each_output(
    anchors: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(5, 3).to(dtype), torch.randn(anchors, 5, dtype=dtype)
    check_spectrum(model, inputs, 1e-5)
    with_ones = torch.cat([inputs, torch.ones(anchors, 1, dtype=dtype)], dim=1).double()
    single = torch.linalg.eigvalsh(with_ones.T @ with_ones / anchors).flip(0)
    found = AnchorMetric(AnchorBatch(model, inputs)).spectrum(6)
    expected = single.repeat_interleave(3)[:6]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(single[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_metric_of_a_networks_head_has_repeated_eigenvalues(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).to(dtype)
    inputs = torch.randn(20, 4, dtype=dtype)
    check_spectrum(model, inputs, 1e-5, model[2].parameters())
    values = AnchorMetric(AnchorBatch(model, inputs), model[2].parameters()).spectrum(6)
    torch.testing.assert_close(values[:5], values[0].expand(5), rtol=1e-5, atol=0)
    assert float(values[5]) < 0.99 * float(values[0])


def test_a_dead_network_has_a_spectrum_of_zeros() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    metric = AnchorMetric(AnchorBatch(model, torch.randn(5, 4)))
    for k in (1, 7, metric.size):
        assert metric.spectrum(k).tolist() == [0.0] * k


@all_cases
def test_the_estimated_diagonal_is_the_mean_of_squared_pullbacks(name: str) -> None:
    case = build(name)
    jac = oracle.jacobian(case.model, case.inputs, "logits", params_of(case.model))
    metric = AnchorMetric(AnchorBatch(case.model, case.inputs))
    estimate = metric.diagonal(3, generator=torch.Generator().manual_seed(5))
    drawn = torch.Generator().manual_seed(5)
    rows = [
        np.einsum("ikn,ik->n", jac, 2.0 * torch.randint(2, jac.shape[:2], generator=drawn) - 1)
        for _ in range(3)
    ]
    expected = np.mean(np.square(rows), axis=0) / len(jac)
    np.testing.assert_allclose(estimate.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_the_estimated_diagonal_is_unbiased_and_has_the_documented_noise() -> None:
    case = build("mlp")
    metric = AnchorMetric(AnchorBatch(case.model, case.inputs))
    exact = metric.diagonal()
    seeded = torch.Generator().manual_seed(0)
    estimates = torch.stack([metric.diagonal(8, generator=seeded) for _ in range(400)])
    moved = exact > 1e-6 * exact.max()
    relative = estimates[:, moved] / exact[moved]
    assert relative.mean(dim=0).sub(1).abs().max() < 5 * math.sqrt(2 / 8 / 400)
    # Random signs, unlike Gaussian noise, have no variance if only one output depends on a weight.
    assert 0 < relative.std(dim=0).mean() < 1.2 * math.sqrt(2 / 8)


@pytest.mark.parametrize("probes", [0, -1])
def test_a_diagonal_without_probes_is_refused(probes: int) -> None:
    case = build("mlp")
    metric = AnchorMetric(AnchorBatch(case.model, case.inputs))
    with pytest.raises(ValueError, match=f"probes: .* got {probes}"):
        metric.diagonal(probes)


@all_cases
def test_the_eigenvectors_are_those_of_the_dense_matrix(name: str) -> None:
    metric, jac = metric_and_jacobian(name)
    g = oracle.metric(jac)
    values, vectors = metric.eigenvectors(4, tol=1e-9)
    v = vectors.numpy()
    largest = np.linalg.eigvalsh(g)[::-1][:4]
    np.testing.assert_allclose(values.numpy(), largest, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(v @ v.T, np.eye(4), atol=1e-9)
    np.testing.assert_allclose(v @ g, values.numpy()[:, None] * v, atol=1e-7 * float(values[0]))


def test_there_are_as_many_eigenvectors_as_eigenvalues_other_than_zero() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    metric = AnchorMetric(AnchorBatch(model, torch.eye(3, dtype=torch.float64)[:2]))
    values, vectors = metric.eigenvectors(2)  # g is diag(1/2, 1/2, 0)
    torch.testing.assert_close(values, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert vectors.shape == (2, 3)
    torch.testing.assert_close(vectors[:, 2], torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="k: must be between 1 and n = 3, got 4"):
        metric.eigenvectors(4)
    with pytest.raises(RuntimeError, match="eigenvectors: 2 eigenvalues .* 1 products"):
        metric.eigenvectors(2, max_products=1)


@all_cases
def test_one_vector_and_all_steps_give_the_density_without_an_error(name: str) -> None:
    """The weights are those that the random vector has in the eigenspaces of the dense matrix."""
    metric, jac = metric_and_jacobian(name)
    stacked = jac.reshape(-1, jac.shape[2]) / math.sqrt(jac.shape[0])
    matrix = min(stacked @ stacked.T, stacked.T @ stacked, key=len)  # the side with shorter vectors
    eigenvalues, vectors = np.linalg.eigh(matrix)
    found = metric.density(1, metric.size, generator=torch.Generator().manual_seed(3))
    again = metric.density(1, metric.size, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found.nodes, again.nodes)
    assert found.size == metric.size
    assert float(found.weights.sum()) == pytest.approx(1.0)
    seed = draw_seed(torch.Generator().manual_seed(3))
    seeded = torch.Generator().manual_seed(seed)
    probe = torch.randn(len(matrix), generator=seeded, dtype=torch.float64).numpy()
    weights = len(matrix) * (vectors.T @ probe) ** 2 / (probe @ probe)
    eigenvalues = np.maximum(eigenvalues, 0)
    for mu in (1e-3 * eigenvalues[-1], eigenvalues[-1]):
        expected = (weights * eigenvalues / (eigenvalues + mu)).sum()
        assert found.effective_dimension(mu).value == pytest.approx(expected, rel=1e-6)
    assert found.trace().value == pytest.approx((weights * eigenvalues).sum(), rel=1e-9)
    below = found.trace_of(lambda x: (x < 1e-12 * float(eigenvalues[-1])).double()).value
    assert below > metric.size - len(matrix) - 1e-6  # the zeros are counted


def test_the_trace_of_the_density_is_that_of_the_diagonal() -> None:
    metric, jac = metric_and_jacobian("residual")
    estimate = metric.density(64, 4, generator=torch.Generator().manual_seed(0)).trace()
    exact = float(metric.diagonal().sum())
    assert abs(estimate.value - exact) < 4 * estimate.error < 0.6 * exact
