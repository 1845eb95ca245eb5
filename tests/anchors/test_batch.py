"""Anchors: drift, forms of inputs, references, draws and augmentation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cases import all_cases, build
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def shift(model: nn.Module, by: float = 0.1) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by)


@all_cases
def test_drift_is_the_mean_squared_distance_from_the_reference(name: str) -> None:
    case = build(name)
    anchors = AnchorBatch(case.model, case.inputs)
    case.model.eval()

    def outputs() -> Tensor:
        inputs = case.inputs
        with torch.no_grad():
            if isinstance(inputs, dict):
                return case.model(**inputs)["logits"].flatten(1)
            return case.model(*(inputs if isinstance(inputs, tuple) else (inputs,))).flatten(1)

    before = outputs()
    assert anchors.drift() < 1e-20
    assert anchors.predictions_kept() == 1.0
    shift(case.model)
    after = outputs()
    each = (after - before).square().sum(dim=1)
    torch.testing.assert_close(anchors.drift("none"), each)
    assert anchors.drift() == pytest.approx(float(each.mean()))
    assert anchors.drift("sum") == pytest.approx(float(each.sum()))
    kept = (after.argmax(1) == before.argmax(1)).double().mean()
    assert anchors.predictions_kept() == pytest.approx(float(kept))
    anchors.refresh()
    assert anchors.drift() == 0.0


def test_drift_in_the_probability_space_is_the_hellinger_distance() -> None:
    model = mlp()
    x = torch.randn(5, 4)
    anchors = AnchorBatch(model, x, output="probabilities")
    p = model(x).softmax(-1)
    shift(model)
    q = model(x).softmax(-1)
    hellinger = 0.5 * (p.sqrt() - q.sqrt()).square().sum(-1)
    assert anchors.drift() == pytest.approx(float(8 * hellinger.mean()), rel=1e-4)


def test_the_probability_space_has_a_derivative_where_a_class_is_impossible() -> None:
    class Certain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    anchors = AnchorBatch(Certain(), torch.tensor([[0.0, 500.0, -500.0]]), output="probabilities")
    assert torch.isfinite(AnchorMetric(anchors).matvec(torch.ones(1))).all()


def test_anchors_added_later_refer_to_the_outputs_at_that_time() -> None:
    model = mlp()
    x, y = torch.randn(5, 4), torch.randn(3, 4)
    anchors = AnchorBatch(model, x)
    shift(model)
    old = anchors.drift("sum")
    anchors.extend(y)
    assert len(anchors) == 8
    assert anchors.drift("sum") == pytest.approx(old)
    torch.testing.assert_close(anchors.drift("none")[5:], torch.zeros(3))


def test_the_caller_may_reuse_its_tensor() -> None:
    model, x = mlp(), torch.randn(5, 4)
    anchors = AnchorBatch(model, x)
    x.zero_()
    assert anchors.drift() == 0.0


def test_draws_are_without_replacement_and_a_function_of_the_step() -> None:
    model, x = mlp(), torch.randn(20, 4)
    make = lambda seed: AnchorBatch(  # noqa: E731
        model, x, batch_size=8, generator=torch.Generator().manual_seed(seed)
    )
    anchors = make(1)
    draws = [anchors.sample(step) for step in range(50)]
    assert all(len(torch.unique(s.inputs, dim=0)) == 8 for s in draws)
    assert all(
        torch.equal(a.inputs, b.inputs)
        for a, b in zip(draws, map(make(1).sample, range(50)), strict=True)
    )
    assert not torch.equal(draws[0].inputs, draws[1].inputs)
    assert not torch.equal(draws[0].inputs, make(2).sample(0).inputs)
    for sample in draws:
        torch.testing.assert_close(anchors.outputs(sample.inputs), sample.reference)
    # Every anchor is drawn at some step.
    assert len(torch.unique(torch.cat([s.inputs for s in draws]), dim=0)) == 20


def test_augmented_anchors_get_the_reference_networks_outputs() -> None:
    model, x = mlp(), torch.randn(10, 4)
    frozen = mlp()
    seen = []

    def augment(inputs: Tensor) -> Tensor:
        seen.append(inputs)
        return inputs + torch.randn_like(inputs)

    anchors = AnchorBatch(model, x, batch_size=4, augment=augment, generator=torch.Generator())
    state = torch.get_rng_state()
    shift(model)
    first, again, other = anchors.sample(0), anchors.sample(0), anchors.sample(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, other.inputs)
    assert len(seen[0]) == 4
    torch.testing.assert_close(first.reference, frozen(first.inputs).detach())
    assert anchors.drift() == pytest.approx(
        float((model(x) - frozen(x)).square().sum(1).mean()), rel=1e-5
    )
    # Anchors added later refer to the network at that time, also if they are augmented.
    later = mlp()
    shift(later)
    anchors.extend(torch.randn(10, 4) + 100)
    shift(model)
    for step in range(5):
        sample = anchors.sample(step)
        late = sample.inputs.mean(1) > 50
        torch.testing.assert_close(sample.reference[late], later(sample.inputs[late]).detach())
        torch.testing.assert_close(sample.reference[~late], frozen(sample.inputs[~late]).detach())


def test_an_empty_sequential_is_a_valid_augmentation() -> None:
    anchors = AnchorBatch(mlp(), torch.randn(5, 4), augment=nn.Sequential())
    anchors.extend(torch.randn(2, 4))
    assert torch.equal(anchors.sample(0).inputs, anchors.inputs)
    torch.testing.assert_close(anchors.sample(0).reference, anchors.reference)


def test_from_loader_takes_the_first_inputs() -> None:
    model, x = mlp(), torch.randn(10, 4)
    loader = DataLoader(TensorDataset(x, torch.zeros(10)), batch_size=4)
    anchors = AnchorBatch.from_loader(model, loader, 6, output="probabilities")
    assert torch.equal(anchors.inputs, x[:6])
    assert anchors.output == "probabilities"
    assert torch.equal(AnchorBatch.from_loader(model, DataLoader(x, batch_size=3), 10).inputs, x)
    case = build("keywords")
    batches = [{**case.inputs, "labels": torch.zeros(5)}]
    assert set(AnchorBatch.from_loader(case.model, batches, 2).inputs) == {
        "input_ids",
        "attention_mask",
    }
    with pytest.raises(ValueError, match="n: 11 anchors wanted, but the loader yields only 10"):
        AnchorBatch.from_loader(model, loader, 11)
    with pytest.raises(ValueError, match="^n:"):
        AnchorBatch.from_loader(model, loader, 0)


def test_wrapped_models_are_seen_through() -> None:
    model = mlp()
    compiled = torch.compile(model)
    anchors = AnchorBatch(compiled, torch.randn(3, 4))
    assert anchors.model is model
    FIPOptimizer(compiled.parameters(), anchors).step()
    assert AnchorBatch(nn.DataParallel(model), torch.randn(3, 4)).model is model


def test_model_outputs_are_read_at_logits() -> None:
    class Output(nn.Module):
        def __init__(self, wrap: object) -> None:
            super().__init__()
            self.inner, self.wrap = mlp(), wrap

        def forward(self, x: Tensor) -> object:
            return self.wrap(self.inner(x))

    x = torch.randn(3, 4)
    expected = mlp()(x).detach()
    for wrap in (lambda y: {"logits": y, "loss": None}, lambda y: SimpleNamespace(logits=y)):
        torch.testing.assert_close(AnchorBatch(Output(wrap), x).reference, expected)
    picked = AnchorBatch(Output(lambda y: (y, y)), x, output=lambda out: out[1][:, :2])
    torch.testing.assert_close(picked.reference, expected[:, :2])


def test_progress_sees_every_chunk_of_every_pass() -> None:
    passes: list[int] = []

    def progress(chunks):
        passes.append(len(chunks))
        return iter(chunks)

    model = nn.Linear(2, 2)
    anchors = AnchorBatch(model, torch.randn(10, 2), chunk_size=4, progress=progress)
    metric = AnchorMetric(anchors, form="forward")
    before = len(passes)
    metric.matvec(torch.randn(metric.size))
    anchors.drift()
    assert passes[before:] == [3, 3]
    with pytest.raises(TypeError, match="^progress: must be callable or None, got int"):
        AnchorBatch(model, torch.randn(10, 2), progress=3)
