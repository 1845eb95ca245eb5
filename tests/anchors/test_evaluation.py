"""Anchors hold what the model computes in eval mode, whatever the model does and wherever it is called."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, Solver


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def steps(
    model: nn.Module, anchors: AnchorBatch, count: int = 1, **options: object
) -> FIPOptimizer:
    """A few steps on a smooth objective."""
    optimizer = FIPOptimizer(model.parameters(), anchors, eps=0.1, **options)
    for i in range(count):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 4 * (i + 2)).reshape(-1, 4)).square().sum().backward()
        optimizer.step()
    return optimizer


# --- a model that writes ------------------------------------------------------------------------------------


class WritesInputs(nn.Module):
    """Normalizes its input in place, as code for inference on images does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if scale is not None:
            x.mul_(scale.clamp_(max=2.0))
        return self.layer(x.sub_(0.3).div_(0.5))


class Counts(nn.Module):
    """Keeps a count of its calls in a buffer, on which its outputs depend."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * (1 + self.calls)


INPUTS: dict[str, Callable[[], object]] = {
    "tensor": lambda: torch.randn(9, 4),
    "tuple": lambda: (torch.randn(9, 4), torch.rand(9, 4) * 4),
    "dict": lambda: {"x": torch.randn(9, 4), "scale": torch.rand(9, 4) * 4},
}


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("form", sorted(INPUTS))
def test_a_model_that_writes_to_its_inputs_writes_to_a_copy(
    form: str, chunk_size: int | None
) -> None:
    model, inputs = WritesInputs(), INPUTS[form]()
    anchors = AnchorBatch(model, inputs, chunk_size=chunk_size)
    assert [anchors.drift() for _ in range(5)] == [0.0] * 5
    traced, run = AnchorMetric(anchors, form="forward"), AnchorMetric(anchors, trace=False)
    v = torch.linspace(-1, 1, traced.size)
    torch.testing.assert_close(traced.matvec(v), run.matvec(v))
    torch.testing.assert_close(traced.matvec(v), run.matvec(v))
    optimizer = FIPOptimizer(model.parameters(), anchors, solver=Solver(products=2))
    optimizer.step()
    assert optimizer.last_step.drift == pytest.approx(anchors.drift(), rel=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_model_that_writes_to_its_buffers_starts_each_evaluation_from_the_same(
    chunk_size: int | None,
) -> None:
    model = Counts()
    anchors = AnchorBatch(model, torch.randn(9, 4), chunk_size=chunk_size)
    assert [anchors.drift() for _ in range(3)] == [0.0] * 3
    assert float(model.calls) == 0.0
    metric = AnchorMetric(anchors)
    torch.testing.assert_close(metric.outputs, anchors.reference)
    # The outputs are twice those of the layer, because each evaluation is the first call.
    torch.testing.assert_close(anchors.reference, 2 * model.layer(anchors.inputs))


# --- contexts of the call ---------------------------------------------------------------------------------------


class Bounded(nn.Module):
    """A parametrization that keeps weights between -1 and 1."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh()


def test_the_drift_of_a_step_inside_cached_parametrizations_is_the_true_one() -> None:
    model = network()
    parametrize.register_parametrization(model[0], "weight", Bounded())
    anchors = AnchorBatch(model, torch.randn(8, 4))
    optimizer = FIPOptimizer(model.parameters(), anchors, eps=0.3)
    with parametrize.cached():
        model(torch.randn(8, 4)).square().sum().backward()
        cached = model[0].weight
        optimizer.step()
        assert model[0].weight is cached  # the cache belongs to the caller and is not changed
        inside = anchors.drift()
    assert inside == anchors.drift() > 0
    assert optimizer.last_step.drift == pytest.approx(inside, rel=1e-5)


def test_anchors_and_optimizer_may_be_built_and_used_in_inference_mode() -> None:
    model = network()
    with torch.inference_mode():
        anchors = AnchorBatch(model, torch.randn(5, 4), batch_size=4, augment=torch.neg)
        anchors.extend(torch.randn(3, 4))
        anchors.refresh()
        anchors.load_state_dict(anchors.state_dict())
        optimizer = FIPOptimizer(
            model.parameters(),
            anchors,
            momentum=0.9,
            precondition="adam",
            solver=Solver(products=2),
        )
        for form in ("forward", "double-vjp"):
            metric = AnchorMetric(anchors, form=form)
            assert float(metric.matvec(torch.ones(metric.size)).norm()) > 0
        assert anchors.drift() == 0.0
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values()]
    assert not any(t.is_inference() for t in (*kept, anchors.inputs, anchors.reference))


@pytest.mark.parametrize("precondition", [None, "adam", "muon"])
def test_another_default_device_changes_nothing(precondition: str | None) -> None:
    def run() -> list[Tensor]:
        model = made[0]
        anchors = AnchorBatch(
            model, made[1], batch_size=4, augment=torch.neg, generator=torch.Generator("cpu")
        )
        anchors.extend(made[1])
        options = {"momentum": 0.9, "precondition": precondition, "solver": Solver(products=3)}
        optimizer = FIPOptimizer(
            model.parameters(), anchors, max_drift=1e-3, generator=torch.Generator("cpu"), **options
        )
        for gradient in (made[2], made[2], None):
            for p in model.parameters():
                p.grad = None if gradient is None else gradient.expand(p.shape).clone()
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        metric = AnchorMetric(anchors)
        return [*(p.detach().clone() for p in model.parameters()), metric.spectrum(2)]

    results = []
    for device in ("cpu", "meta"):  # meta stands for a GPU
        made = network(), torch.linspace(-1, 1, 20).reshape(5, 4), torch.tensor(0.1)
        with torch.device(device):
            results.append(run())
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_threads_take_turns_and_leave_the_process_as_it_was() -> None:
    alone = [run_of(seed) for seed in range(4)]
    found: dict[int, Tensor] = {}
    errors: list[BaseException] = []

    def thread(seed: int) -> None:
        try:
            found[seed] = run_of(seed)
        except BaseException as error:
            errors.append(error)

    fast = torch.backends.mha.get_fastpath_enabled()
    threads = [threading.Thread(target=thread, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    for seed, expected in enumerate(alone):
        assert torch.equal(found[seed], expected)
    assert torch.backends.mha.get_fastpath_enabled() == fast


def run_of(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    anchors = AnchorBatch(model, torch.randn(5, 4, generator=generator))
    optimizer = FIPOptimizer(
        model.parameters(), anchors, solver=Solver(products=3), generator=generator
    )
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().sum().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- a model that differentiates by itself --------------------------------------------------------------------


class Force(nn.Module):
    """The gradient of an energy by the input, as models of molecules give it."""

    def __init__(self, enables: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.enables = enables

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.enables or torch.is_grad_enabled()):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("enables", [True, False])
def test_a_model_may_differentiate_in_its_forward_pass(enables: bool) -> None:
    model = Force(enables).double()
    anchors = AnchorBatch(model, torch.randn(5, 4, dtype=torch.float64))
    params = [p for name, p in model.named_parameters() if name != "energy.2.bias"]

    def outputs(*values: Tensor) -> Tensor:
        names = [name for name, _ in model.named_parameters() if name != "energy.2.bias"]
        weights = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, weights, (anchors.inputs,)).reshape(5, -1)

    jacobian = torch.autograd.functional.jacobian(outputs, tuple(p.detach() for p in params))
    rows = torch.cat([part.reshape(20, -1) for part in jacobian], dim=1)
    for options in (
        {"form": "forward"},
        {"form": "forward", "trace": False},
        {"form": "double-vjp"},
    ):
        metric = AnchorMetric(anchors, params, **options)
        v = torch.linspace(-1, 1, metric.size, dtype=torch.float64)
        torch.testing.assert_close(metric.matvec(v), rows.T @ (rows @ v) / 5)
    optimizer = FIPOptimizer(params, anchors, eps=0.1, solver=Solver(products=3))
    model(torch.randn(8, 4, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert optimizer.last_step.drift == pytest.approx(anchors.drift(), rel=1e-9)
    assert anchors.drift() > 0


def test_autocast_in_the_forward_of_a_module_is_left_out():
    """Accelerate puts it there, and keeps the original forward beside it."""
    inner = nn.Linear(4, 3)
    model, x = nn.Sequential(inner, nn.Tanh()), torch.randn(5, 4)
    anchors, exact = AnchorBatch(model, x), model(x)
    inner._original_forward = inner.forward
    replaced = torch.autocast("cpu", dtype=torch.bfloat16)(inner.forward)
    inner.forward = replaced
    assert not torch.equal(model(x).float(), exact)
    assert anchors.drift() == 0.0
    assert inner.forward is replaced
