"""Products with J, J^T and g against an independent Jacobian."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from cases import TOGETHER, all_cases, build, cases_in_chunks
from curvlinops import GGNLinearOperator
from torch import Tensor, nn

from benchmarks.memory import LiveMemory
from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer
from fipoptim.metric.blocks import BLOCK
from fipoptim.metric.trace_cache import CACHES


def params_of(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@all_cases
def test_the_outputs_after_a_step_are_told_before_any_weight_moves(name: str) -> None:
    case = build(name)
    anchors, params = AnchorBatch(case.model, case.inputs), params_of(case.model)
    metric = AnchorMetric(anchors)
    v = 1e-2 * torch.randn(metric.size, dtype=torch.float64)
    versions = [p._version for p in params]
    told = metric.outputs_after(v)
    assert [p._version for p in params] == versions
    torch.testing.assert_close(metric.outputs_now(), metric.outputs, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for p, part in zip(params, metric.unflatten(v), strict=True):
            p += part
    torch.testing.assert_close(told, anchors.outputs(anchors.inputs), rtol=1e-12, atol=1e-12)


def test_a_step_is_measured_in_the_layout_of_the_weights() -> None:
    # PyTorch would sum this weight and a contiguous step into a third layout, which made pooling six times slower.
    model = nn.Conv2d(1, 4, 3).to(memory_format=torch.channels_last)
    anchors, layouts = AnchorBatch(model, torch.randn(2, 1, 5, 5)), []
    model.register_forward_pre_hook(lambda module, _: layouts.append(module.weight.stride()))
    metric = AnchorMetric(anchors, trace=False)
    metric.outputs_after(torch.ones(metric.size))
    assert layouts[-1] == model.weight.stride()


@pytest.mark.parametrize("space", sorted(oracle.SPACES))
@pytest.mark.parametrize(
    ("form", "trace"), [("forward", True), ("forward", False), ("double-vjp", False)]
)
@all_cases
def test_products_are_those_of_the_dense_jacobian(
    name: str, form: str, trace: bool, space: str
) -> None:
    case = build(name)
    jac = oracle.jacobian(case.model, case.inputs, space, params_of(case.model))
    anchors = AnchorBatch(case.model, case.inputs, output=oracle.SPACES[space][0])
    metric = AnchorMetric(anchors, form=form, trace=trace)
    # If outputs depend on the other anchors, a trace cannot be checked on a few anchors, and none is used.
    assert metric.traced == (trace and name not in TOGETHER)
    v, u = (
        torch.randn(metric.size, dtype=torch.float64),
        torch.randn(jac.shape[:2], dtype=torch.float64),
    )
    expected = oracle.metric(jac) @ v.numpy()
    for _ in range(2):  # the second product must give the same result
        np.testing.assert_allclose(metric.jvp(v).numpy(), jac @ v.numpy(), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(metric.matvec(v).numpy(), expected, rtol=1e-9, atol=1e-12)
    expected = np.einsum("ikn,ik->n", jac, u.numpy())
    np.testing.assert_allclose(metric.vjp(u).numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "cnn-batch-norm", "residual", "tied"])
def test_logit_products_are_the_generalized_gauss_newton_of_the_squared_error(name: str) -> None:
    case = build(name)
    n_anchors = len(case.inputs)
    anchors = AnchorBatch(case.model, case.inputs)
    metric = AnchorMetric(anchors)
    case.model.eval()
    target = torch.zeros_like(case.model(case.inputs)).detach()
    ggn = GGNLinearOperator(
        case.model,
        nn.MSELoss(reduction="sum"),
        list(case.model.parameters()),
        [(case.inputs, target)],
        check_deterministic=False,
    )
    v = torch.randn(metric.size, dtype=torch.float64)
    # The Hessian of the summed squared error is twice the identity.
    torch.testing.assert_close(2 * n_anchors * metric.matvec(v), ggn @ v, rtol=1e-9, atol=1e-12)


@cases_in_chunks
def test_chunks_change_nothing_but_the_memory(name: str) -> None:
    case = build(name)
    whole = AnchorMetric(AnchorBatch(case.model, case.inputs))
    parts = AnchorMetric(AnchorBatch(case.model, case.inputs, chunk_size=2))
    v, u = torch.randn(whole.size, dtype=torch.float64), torch.randn_like(whole.outputs)
    torch.testing.assert_close(parts.outputs, whole.outputs)
    torch.testing.assert_close(parts.jvp(v), whole.jvp(v))
    torch.testing.assert_close(parts.vjp(u), whole.vjp(u))
    torch.testing.assert_close(parts.matvec(v), whole.matvec(v))
    torch.testing.assert_close(parts.diagonal(), whole.diagonal())


def test_many_anchors_are_kept_in_blocks_that_change_nothing() -> None:
    case = build("mlp")
    inputs = torch.randn(3 * BLOCK + 7, 4, dtype=torch.float64)
    anchors = AnchorBatch(case.model, inputs)
    metric = AnchorMetric(anchors)
    assert len(metric.linearizer.blocks) == 4
    assert len(CACHES[anchors].by_shape) == 2  # blocks of the same size, and a smaller last one
    jac = oracle.jacobian(case.model, inputs, "logits", params_of(case.model))
    v, u = torch.randn(metric.size, dtype=torch.float64), torch.randn_like(metric.outputs)
    np.testing.assert_allclose(metric.jvp(v).numpy(), jac @ v.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        metric.matvec(v).numpy(), oracle.metric(jac) @ v.numpy(), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(
        metric.vjp(u).numpy(), np.einsum("ikn,ik->n", jac, u.numpy()), rtol=1e-9, atol=1e-10
    )


def test_memory_grows_with_the_chunk_and_not_with_the_anchors() -> None:
    model = nn.Sequential(
        nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
    )

    def peak(anchors: int, chunk: int) -> int:
        metric = AnchorMetric(AnchorBatch(model, torch.randn(anchors, 8), chunk_size=chunk))
        with LiveMemory() as memory:
            metric.matvec(torch.randn(metric.size))
            AnchorMetric(metric.anchors)
        return memory.peak

    small = peak(256, 64)
    assert peak(2048, 64) == pytest.approx(small, rel=0.05)
    assert peak(2048, 2048) > 3 * small


@pytest.mark.parametrize("name", ["cnn-batch-norm", "transformer"])
def test_mode_buffers_gradients_and_random_state_are_untouched(name: str) -> None:
    case = build(name)
    model = case.model
    next(iter(model.children())).eval()  # a mixed mode is restored module by module
    modes = [m.training for m in model.modules()]
    buffers = {k: b.clone() for k, b in model.named_buffers()}
    state, fastpath = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    anchors = AnchorBatch(model, case.inputs, generator=torch.Generator())
    metric = AnchorMetric(anchors)
    metric.matvec(torch.ones(metric.size, dtype=torch.float64))
    metric.diagonal()
    anchors.drift()
    opt = FIPOptimizer(model.parameters(), anchors, generator=torch.Generator())
    opt.step()
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(b, buffers[k]) for k, b in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert all(p.grad is None for p in model.parameters())


def test_a_metric_says_when_the_weights_have_changed() -> None:
    case = build("mlp")
    metric = AnchorMetric(AnchorBatch(case.model, case.inputs))
    with torch.no_grad():
        case.model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="weights have changed"):
        metric.matvec(torch.zeros(metric.size, dtype=torch.float64))


def test_float32_products_of_a_transformer_agree_with_float64() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(24, 3)
    )
    x = torch.randn(4, 3, 8)
    single = AnchorMetric(AnchorBatch(model, x))
    v = torch.randn(single.size)
    product = single.matvec(v)
    double = AnchorMetric(AnchorBatch(model.double(), x.double()))
    torch.testing.assert_close(product.double(), double.matvec(v.double()), rtol=1e-3, atol=1e-5)


def test_autocast_does_not_reach_the_metric() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    anchors = AnchorBatch(model, torch.randn(4, 8))
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    expected = AnchorMetric(anchors).matvec(v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert anchors.drift() == 0.0
        assert torch.equal(AnchorMetric(anchors).matvec(v), expected)


def test_bad_vectors_and_sizes_are_named() -> None:
    case = build("mlp")
    metric = AnchorMetric(AnchorBatch(case.model, case.inputs))
    with pytest.raises(ValueError, match="^v: must be a flat vector"):
        metric.matvec(torch.zeros(3))
    with pytest.raises(ValueError, match="^u: must have the outputs' shape"):
        metric.vjp(torch.zeros(3))
    with pytest.raises(ValueError, match="^k: must be between"):
        metric.spectrum(0)
    with pytest.raises(RuntimeError, match="not converged"):
        metric.spectrum(10, tol=0.0, max_products=11)
    with pytest.raises(ValueError, match="^params: got none"):
        AnchorMetric(metric.anchors, [])
