"""Products with J, J^T and g against an independent Jacobian."""

from __future__ import annotations

import functools
import gc
import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cases import TOGETHER, all_cases, build, cases_in_chunks
from curvlinops import GGNLinearOperator
from torch import Tensor, nn

from benchmarks.memory import LiveMemory
from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer
from fipoptim.anchors.route import MOST_STALE, MOSTCACHES
from fipoptim.metric import trace_cache
from fipoptim.metric.blocks import BLOCK
from fipoptim.metric.trace import Traced
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
    # PyTorch sums this weight and a contiguous step into a third layout, in which pooling took six times as long.
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
    # Where outputs depend on the other anchors no trace can be checked on a few, and none is used.
    assert metric.traced == (trace and name not in TOGETHER)
    v, u = (
        torch.randn(metric.size, dtype=torch.float64),
        torch.randn(jac.shape[:2], dtype=torch.float64),
    )
    expected = oracle.metric(jac) @ v.numpy()
    for _ in range(2):  # products leave what they need as it was
        np.testing.assert_allclose(metric.jvp(v).numpy(), jac @ v.numpy(), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(metric.matvec(v).numpy(), expected, rtol=1e-9, atol=1e-12)
    expected = np.einsum("ikn,ik->n", jac, u.numpy())
    np.testing.assert_allclose(metric.vjp(u).numpy(), expected, rtol=1e-9, atol=1e-12)


@all_cases
def test_the_matrix_its_diagonal_and_its_spectrum(name: str) -> None:
    case = build(name)
    g = oracle.metric(oracle.jacobian(case.model, case.inputs, "logits", params_of(case.model)))
    metric = AnchorMetric(AnchorBatch(case.model, case.inputs))
    np.testing.assert_allclose(metric.dense().numpy(), g, rtol=1e-9, atol=1e-12)
    if name in TOGETHER:
        with pytest.raises(ValueError, match="probes: .* depend on the others"):
            metric.diagonal()
        estimate = metric.diagonal(4000, generator=torch.Generator().manual_seed(0)).numpy()
        np.testing.assert_allclose(estimate, np.diag(g), rtol=0.2, atol=1e-12)
    else:
        np.testing.assert_allclose(metric.diagonal().numpy(), np.diag(g), rtol=1e-9, atol=1e-12)
    largest = np.linalg.eigvalsh(g)[::-1][:5]
    np.testing.assert_allclose(metric.spectrum(5, tol=1e-9).numpy(), largest, rtol=1e-6, atol=1e-9)


def check_spectrum(model: nn.Module, inputs: Any, tol: float, params: Any = None) -> None:
    """Spectra of several lengths, up to all eigenvalues, against the dense decomposition."""
    metric = AnchorMetric(AnchorBatch(model, inputs), params)
    g = oracle.metric(oracle.jacobian(model, inputs, "logits", metric.params))
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
def test_so_has_the_head_of_a_network(dtype: torch.dtype) -> None:
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


def test_the_estimated_diagonal_is_unbiased_and_as_noisy_as_it_says() -> None:
    case = build("mlp")
    metric = AnchorMetric(AnchorBatch(case.model, case.inputs))
    exact = metric.diagonal()
    seeded = torch.Generator().manual_seed(0)
    estimates = torch.stack([metric.diagonal(8, generator=seeded) for _ in range(400)])
    moved = exact > 1e-6 * exact.max()
    relative = estimates[:, moved] / exact[moved]
    assert relative.mean(dim=0).sub(1).abs().max() < 5 * math.sqrt(2 / 8 / 400)
    # Signs, unlike Gaussian noise, have no variance where a single output depends on a weight.
    assert 0 < relative.std(dim=0).mean() < 1.2 * math.sqrt(2 / 8)


@pytest.mark.parametrize("probes", [0, -1])
def test_a_diagonal_without_probes_is_refused(probes: int) -> None:
    case = build("mlp")
    metric = AnchorMetric(AnchorBatch(case.model, case.inputs))
    with pytest.raises(ValueError, match=f"probes: .* got {probes}"):
        metric.diagonal(probes)


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


# --- the trace of the derivative ----------------------------------------------------------------------------


class Scaled(nn.Module):
    """A model that does what its attributes say: neither is a weight, so a trace does not see them change."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2, dtype=torch.float64)
        self.factor = 1.0
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.layer(x)
        if self.branch and z.sum() > 0:  # control flow that depends on values
            return 2 * z
        return self.factor * z.tanh()


INPUTS = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


def test_a_trace_serves_all_weights_and_inputs_of_its_shape() -> None:
    model = Scaled()
    anchors = AnchorBatch(model, INPUTS)
    for _ in range(3):
        with torch.no_grad():
            model.layer.weight.add_(0.1)
        anchors.inputs = anchors.inputs + 0.1
        traced, run = AnchorMetric(anchors), AnchorMetric(anchors, trace=False)
        v = torch.randn(traced.size, dtype=torch.float64)
        torch.testing.assert_close(traced.outputs, run.outputs)
        torch.testing.assert_close(traced.matvec(v), run.matvec(v))
    assert len(CACHES[anchors].by_shape) == 1
    assert anchors.route.stale == 0


def test_a_model_that_behaves_otherwise_is_traced_anew_and_in_the_end_run() -> None:
    model = Scaled()
    anchors = AnchorBatch(model, INPUTS)
    for i in range(MOST_STALE + 2):
        model.factor = 1.0 + i
        metric, run = AnchorMetric(anchors), AnchorMetric(anchors, trace=False)
        v = torch.randn(metric.size, dtype=torch.float64)
        torch.testing.assert_close(metric.outputs, run.outputs)
        torch.testing.assert_close(metric.matvec(v), run.matvec(v))
        assert metric.traced == (i < MOST_STALE)


def test_a_model_that_cannot_be_traced_is_run() -> None:
    model = Scaled(branch=True)
    anchors = AnchorBatch(model, INPUTS)
    metric = AnchorMetric(anchors)
    assert not metric.traced
    jac = oracle.jacobian(model, INPUTS, "logits", params_of(model))
    v = torch.randn(metric.size, dtype=torch.float64)
    np.testing.assert_allclose(metric.matvec(v).numpy(), oracle.metric(jac) @ v.numpy(), rtol=1e-9)


def test_inputs_of_ever_new_shapes_are_not_all_traced() -> None:
    model = Scaled()
    anchors = AnchorBatch(model, INPUTS)
    for count in range(3, MOSTCACHES + 6):
        anchors.inputs = torch.randn(count, 3, dtype=torch.float64)
        metric = AnchorMetric(anchors)
        run = AnchorMetric(anchors, trace=False)
        v = torch.randn(metric.size, dtype=torch.float64)
        torch.testing.assert_close(metric.matvec(v), run.matvec(v))
    assert len(CACHES[anchors].by_shape) == MOSTCACHES


def test_frozen_parameters_are_not_differentiated_by_and_may_change() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    anchors = AnchorBatch(model, INPUTS)
    model[0].requires_grad_(False)
    for _ in range(2):
        with torch.no_grad():
            model[0].weight.mul_(1.5)
        traced, run = AnchorMetric(anchors), AnchorMetric(anchors, trace=False)
        assert traced.names == ["2.weight", "2.bias"]
        v = torch.randn(traced.size, dtype=torch.float64)
        torch.testing.assert_close(traced.matvec(v), run.matvec(v))
    assert len(CACHES[anchors].by_shape) == 1


class Viewing(nn.Module):
    """Reads its feature maps with ``view``, which takes them in one layout only."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3, dtype=torch.float64)
        self.head = nn.Linear(3 * 4 * 4, 2, dtype=torch.float64)
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).tanh()
        return self.head(y.view(len(y), -1) if self.view else y.flatten(1))


@pytest.mark.parametrize("view", [False, True])
def test_images_are_traced_channels_last_where_the_model_allows_it(view: bool) -> None:
    model = Viewing(view)
    inputs = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    anchors = AnchorBatch(model, inputs)
    metric = AnchorMetric(anchors)
    assert metric.traced
    assert anchors.route.channels_last == (not view)
    jac = oracle.jacobian(model, inputs, "logits", params_of(model))
    v = torch.randn(metric.size, dtype=torch.float64)
    np.testing.assert_allclose(metric.matvec(v).numpy(), oracle.metric(jac) @ v.numpy(), rtol=1e-9)
    torch.testing.assert_close(metric.outputs_now(), anchors.reference)


@all_cases
def test_the_parts_compile_without_a_graph_break(name: str, monkeypatch) -> None:
    # What is generated is torch's affair, and takes a C++ compiler; that nothing is left to Python is ours.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    case = build(name)
    metric = AnchorMetric(AnchorBatch(case.model, case.inputs), form="forward", compile=True)
    assert metric.traced == (name not in TOGETHER)
    run = AnchorMetric(AnchorBatch(case.model, case.inputs), form="forward", trace=False)
    v = torch.randn(metric.size, dtype=torch.float64)
    torch.testing.assert_close(metric.matvec(v), run.matvec(v))
    torch._dynamo.reset()


def test_traces_go_with_their_anchors() -> None:
    gc.collect()
    before = len(CACHES)
    anchors = AnchorBatch(Scaled(), INPUTS)
    AnchorMetric(anchors)
    assert len(CACHES) == before + 1
    del anchors
    gc.collect()
    assert len(CACHES) == before


@pytest.mark.parametrize("name", sorted(TOGETHER))
def test_outputs_that_depend_on_the_other_anchors_are_never_traced(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, made = build(name), []

    class Counted(Traced):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(self)
            super().__init__(*args, **options)

    monkeypatch.setattr(trace_cache, "Traced", Counted)
    anchors = AnchorBatch(case.model, case.inputs)
    for _ in range(4):
        AnchorMetric(anchors)
        with torch.no_grad():
            for p in case.model.parameters():
                p.mul_(1.01)
    assert not made
