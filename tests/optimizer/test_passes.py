"""The cost of a step, counted in passes through the network and in reads of numbers rather than in seconds."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from benchmarks.memory import LiveMemory
from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, Solver
from fipoptim.metric.blocks import BLOCK
from fipoptim.metric.linearizer import Linearizer
from fipoptim.metric.trace_cache import CACHES
from fipoptim.solver import sphere

IN, HIDDEN, OUT, ANCHORS = 5, 37, 3, 20


class Passes(TorchDispatchMode):
    """Counts passes through a network of two layers by the matrix products that only one kind of pass has.

    Attributes:
        passes: ``forward``, ``tangent`` and ``pullback`` over blocks of anchors, and ``check`` for the
            two anchors on which a trace is compared with the model.
        reads: How often a number was read from a tensor, each of which waits for a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passes: Counter[str] = Counter()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            self.reads += 1
        if name in ("aten::mm", "aten::addmm"):
            a, b = args[-2:]
            rows = a.shape[0]
            if name == "aten::addmm" and b.shape == (IN, HIDDEN):
                self.passes["check" if rows == 2 else "forward"] += 1
            if name == "aten::mm" and b.shape == (IN, HIDDEN):
                self.passes["tangent"] += 1
            # P of Muon's geometry is also multiplied on the shorter side of a gradient.
            if name == "aten::mm" and tuple(result.shape) == (HIDDEN, IN) and a.shape[1] != IN:
                self.passes["pullback"] += 1
        return result


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT))


def new_gradients(model: nn.Sequential, opt: FIPOptimizer) -> None:
    opt.zero_grad()
    model(torch.randn(8, model[0].in_features)).square().sum().backward()


def before_a_step(model: nn.Sequential, anchors: AnchorBatch, **options: Any) -> FIPOptimizer:
    """Returns an optimizer before its second step, which has a drift to correct and needs no new trace."""
    opt = FIPOptimizer(model.parameters(), anchors, **options)
    new_gradients(model, opt)
    opt.step()
    new_gradients(model, opt)
    return opt


def before_a_step_of_a_deep_network(depth: int, precondition: str | None) -> FIPOptimizer:
    """Returns an optimizer with momentum before its second step, for a network of ``depth`` small layers."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)])
    anchors = AnchorBatch(model, torch.randn(6, 4))
    return before_a_step(model, anchors, precondition=precondition, momentum=0.9, eps=0.01)


def count_of_a_step(
    batch: dict[str, int] | None = None, anchors: int = ANCHORS, **options: Any
) -> Passes:
    """Counts the passes of one step, without the forward and backward pass over the new batch."""
    model = network()
    opt = before_a_step(
        model, AnchorBatch(model, torch.randn(anchors, IN), **(batch or {})), **options
    )
    with Passes() as counter:
        opt.step()
    return counter


def test_a_step_without_products_takes_the_passes_of_a_distillation_step() -> None:
    passes = count_of_a_step(solver=Solver(products=0)).passes
    assert passes == {"forward": 1, "pullback": 1}


def test_an_adaptive_step_measures_whether_products_are_needed() -> None:
    assert count_of_a_step(beta=1e6).passes == {"forward": 2, "pullback": 1}


def test_a_budget_measures_a_step_when_it_has_to_hold() -> None:
    free = {"solver": Solver(products=0), "max_drift": 1e9}
    assert count_of_a_step(**free).passes == {"forward": 2, "pullback": 1}
    # The second step is not checked, but a step may not go further than the budget leaves room for.
    assert count_of_a_step(**free, check_every=3).passes == {"forward": 2, "pullback": 1}


def test_the_effect_of_a_step_is_measured_once_it_is_read() -> None:
    model = network()
    anchors = AnchorBatch(model, torch.randn(ANCHORS, IN))
    opt = before_a_step(model, anchors, solver=Solver(products=0))
    opt.step()
    assert opt.last_step is not None
    with Passes() as counter:
        assert opt.last_step.step_norm > 0
        assert counter.passes == {}
        assert opt.last_step.drift > 0
        assert opt.last_step.output_change > 0
    assert counter.passes == {"forward": 1}


def test_no_derivative_is_traced_before_a_step_takes_products() -> None:
    model = network()
    anchors = AnchorBatch(model, torch.randn(ANCHORS, IN))
    for solver, traces in ((Solver(), 0), (Solver(products=0), 0), (Solver(products=1), 1)):
        opt = FIPOptimizer(model.parameters(), anchors, beta=1e6, eps=1e-3, solver=solver)
        model(torch.randn(8, IN)).square().sum().backward()
        opt.step()
        assert (anchors in CACHES and len(CACHES[anchors].by_shape)) == traces


def test_an_adaptive_step_that_needs_products_takes_two_forward_passes_besides_them() -> None:
    # Two passes are before and after the step without products. The trace, which products need, takes another.
    passes = count_of_a_step(
        beta=1e-6, solver=Solver(max_products=3, tol=0.0, radius=1e-12), drift_correction=False
    ).passes
    assert passes == {"check": 1, "forward": 4, "tangent": 3, "pullback": 2}


@pytest.mark.parametrize("products", [1, 3, 6])
def test_each_product_takes_a_tangent_and_a_pullback_and_the_last_one_half(products: int) -> None:
    passes = count_of_a_step(solver=Solver(products=products, tol=0.0)).passes
    assert passes == {"check": 1, "forward": 2, "tangent": products, "pullback": products}


def test_a_preserving_step_without_drift_correction_takes_no_restoring_term() -> None:
    passes = count_of_a_step(solver=Solver(products=3, tol=0.0), drift_correction=False).passes
    assert passes == {"check": 1, "forward": 2, "tangent": 3, "pullback": 2}


def test_chunks_multiply_the_passes_and_evaluate_the_model_again_for_each() -> None:
    passes = count_of_a_step(
        batch={"chunk_size": 10}, solver=Solver(products=3, tol=0.0), drift_correction=False
    ).passes
    # Two chunks: outputs, two products and a half, measured change.
    assert passes == {"check": 1, "forward": 2 * (1 + 3 + 1), "tangent": 2 * 3, "pullback": 2 * 2}


@pytest.mark.parametrize("precondition", ["adam", "muon"])
def test_a_geometry_and_momentum_take_no_further_pass(precondition: str) -> None:
    options: dict[str, Any] = {"solver": Solver(products=3, tol=0.0)}
    plain = count_of_a_step(**options)
    rich = count_of_a_step(**options, precondition=precondition, momentum=0.9)
    assert rich.passes == plain.passes


def test_max_drift_that_holds_takes_one_evaluation_of_all_anchors() -> None:
    # That evaluation also measures the step if every step sees all anchors.
    passes = count_of_a_step(beta=1e6, max_drift=1e9).passes
    assert passes == {"forward": 2, "pullback": 1}
    passes = count_of_a_step(beta=1e6, max_drift=1e9, batch={"batch_size": 15}).passes
    assert passes == {"forward": 3, "pullback": 1}


def test_each_further_product_of_a_step_reads_few_numbers_from_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = sphere.small_problem

    def uncounted(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():  # the small problem is on the CPU even if the network is not
            return small(*args, **kwargs)

    monkeypatch.setattr(sphere, "small_problem", uncounted)
    one = count_of_a_step(solver=Solver(products=1, tol=0.0)).reads
    many = count_of_a_step(solver=Solver(products=11, tol=0.0)).reads
    # The numbers are the norm of the new vector, and three of the projection, which is on the CPU.
    assert many - one <= 10 * 4


def test_a_metric_product_reads_no_number_from_a_tensor() -> None:
    model = network()
    metric = AnchorMetric(AnchorBatch(model, torch.randn(ANCHORS, IN)))
    with Passes() as counter:
        metric.matvec(torch.randn(metric.size))
    assert counter.reads == 0


@pytest.mark.parametrize(("precondition", "further"), [(None, 4), ("adam", 8), ("muon", 8)])
@pytest.mark.parametrize("products", [1, 3, 8])
def test_a_step_needs_memory_for_one_vector_per_product_and_a_few_more(
    products: int, precondition: str | None, further: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Linear(512, 8))
    size = 4 * sum(p.numel() for p in model.parameters())
    solver = Solver(products=products, tol=0.0)
    anchors = AnchorBatch(model, torch.randn(24, 64), chunk_size=8)

    def peak(optimizer: torch.optim.Optimizer) -> int:
        for _ in range(3):  # the last step has a trace and a state already, and a drift to correct
            optimizer.zero_grad()
            model(torch.randn(8, 64)).square().sum().backward()
            with LiveMemory() as memory:
                optimizer.step()
        return memory.peak

    ours = peak(FIPOptimizer(model.parameters(), anchors, precondition=precondition, solver=solver))
    adam = peak(torch.optim.Adam(model.parameters()))
    with LiveMemory() as chunk:
        model(torch.randn(8, 64))
    assert ours <= adam + (products + further) * size + chunk.peak


def test_a_product_runs_no_model_and_its_blocks_share_a_trace() -> None:
    model = network()
    metric = AnchorMetric(AnchorBatch(model, torch.randn(3 * BLOCK, IN)))
    with Passes() as counter:
        metric.matvec(torch.randn(metric.size))
    assert counter.passes == {"tangent": 3, "pullback": 3}


def test_a_product_reads_its_vector_in_place() -> None:
    model = network()
    metric = AnchorMetric(AnchorBatch(model, torch.randn(5, IN)))
    v = torch.randn(metric.size)
    parts: list[Tensor] = metric.unflatten(v)
    assert all(p.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() for p in parts)
    weights = metric.linearizer.point.weights.parameters
    assert all(weights[k].data_ptr() == p.data_ptr() for k, p in model.named_parameters())


@pytest.mark.parametrize("precondition", ["adam", "muon"])
def test_momentum_and_a_geometry_read_no_number_per_parameter_except_those_kept_on_the_cpu(
    precondition: str,
) -> None:
    def reads(depth: int) -> int:
        optimizer = before_a_step_of_a_deep_network(depth, precondition)
        # These numbers stay on the CPU even if the parameters are on a GPU, so reading them does not count.
        kept = {
            state[name].data_ptr()
            for state in optimizer.state.values()
            for name in ("step", "exp_avg_weight")
        }
        assert all(
            state["exp_avg_weight"].device.type == "cpu" for state in optimizer.state.values()
        )
        counter = _Read()
        with counter:
            optimizer.step()
        return len([pointer for pointer in counter.pointers if pointer not in kept])

    assert reads(2) == reads(9)


@pytest.mark.parametrize(
    ("precondition", "further"),
    # Muon converts a matrix to float64, squares it, and multiplies it by the inverse of P.
    [(None, 0), ("adam", 0), ("muon", 3)],
)
def test_a_step_launches_only_its_passes_and_matrix_products_per_layer(
    precondition: str | None, further: int
) -> None:
    """A deep, narrow network waits for launches on a GPU, where an operation on a list of tensors is one launch."""

    def launches(depth: int) -> Counter[str]:
        optimizer = before_a_step_of_a_deep_network(depth, precondition)
        counter = _Launches()
        with counter:
            optimizer.step()
        assert optimizer.last_step is not None
        assert optimizer.last_step.iterations == 0
        return counter.names

    few, many = launches(2), launches(9)
    # Each of the two forward passes has one product; the backward pass has two, and a sum for the bias.
    assert (many.total() - few.total()) / (9 - 2) == 5 + further, many - few


@pytest.mark.parametrize(
    ("precondition", "rows", "most"),
    [
        (None, 400, 28),
        ("adam", 400, 45),
        ("muon", 400, 51),  # this matrix is too large to be orthogonalised
        ("muon", 40, 46),
    ],
)
def test_a_step_reads_and_writes_few_vectors(
    precondition: str | None, rows: int, most: int
) -> None:
    """If passes are short, the time of a step on a CPU is that of reading and writing vectors of all weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, rows))
    size = sum(p.numel() for p in model.parameters())
    anchors = AnchorBatch(model, torch.randn(1, 300))
    opt = before_a_step(model, anchors, precondition=precondition, momentum=0.9, eps=1e-3)
    counter = _Traffic()
    with counter:
        opt.step()
    assert opt.last_step is not None
    assert opt.last_step.iterations == 0
    assert counter.numbers <= most * size


class _Traffic(TorchDispatchMode):
    """Counts the numbers that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in _Launches.FREE:
            # Operations in place on lists return None.
            written = args[0] if result is None else result
            for tensor in tree_flatten((args, kwargs, written))[0]:
                self.numbers += tensor.numel() if isinstance(tensor, Tensor) else 0
        return result


class _Launches(TorchDispatchMode):
    """Counts operations that would be launched on a GPU if the network were on one."""

    VIEWS = frozenset(("t", "permute", "view", "detach", "slice", "select", "split", "unbind"))
    FREE = VIEWS | {"split_with_sizes", "empty_like", "new_empty"}
    # The step counts and the weights of means are kept on the CPU. Subnormal numbers are handled only there.
    ON_THE_CPU = frozenset(("_local_scalar_dense", "lift_fresh", "hardshrink"))

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        counts_a_step = name == "add_" and args[0].dim() == 0
        if name not in self.FREE | self.ON_THE_CPU and not counts_a_step:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


class _Read(TorchDispatchMode):
    """Records the addresses of the numbers that were read from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.pointers: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.pointers.append(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize(
    "options", [{"solver": Solver(products=0)}, {"solver": Solver(products=2)}, {"max_drift": 1e-9}]
)
def test_a_step_frees_its_linearization_without_the_garbage_collector(
    monkeypatch: pytest.MonkeyPatch, traced: bool, options: dict[str, Any]
) -> None:
    # The linearization holds the outputs of every layer: a gigabyte for a few hundred images.
    model = nn.Sequential(
        nn.Linear(IN, HIDDEN),
        nn.BatchNorm1d(HIDDEN, track_running_stats=traced),
        nn.Linear(HIDDEN, OUT),
    ).eval()
    made = []
    take = Linearizer.__init__

    def remembered(self: Linearizer, *args: Any, **kwargs: Any) -> None:
        take(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Linearizer, "__init__", remembered)
    opt = FIPOptimizer(model.parameters(), AnchorBatch(model, torch.randn(ANCHORS, IN)), **options)
    made.clear()
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            opt.zero_grad()
            model(torch.randn(8, IN)).square().sum().backward()
            opt.step()
        left = [linearizer() is not None for linearizer in made]
    finally:
        gc.enable()
    assert len(left) >= 2
    assert not any(left)
