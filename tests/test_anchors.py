"""Anchors: forms of inputs, references, draws, augmentation, and what is refused."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from cases import all_cases, build
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer
from fipoptim.anchors.fingerprint import fingerprint_of, same_reference


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


def test_the_probability_space_is_the_hellinger_distance() -> None:
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


def test_extended_anchors_refer_to_the_outputs_of_their_day() -> None:
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
    # Every anchor has its turn.
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
    # Anchors added later belong to the network of that day, also where they are augmented.
    later = mlp()
    shift(later)
    anchors.extend(torch.randn(10, 4) + 100)
    shift(model)
    for step in range(5):
        sample = anchors.sample(step)
        late = sample.inputs.mean(1) > 50
        torch.testing.assert_close(sample.reference[late], later(sample.inputs[late]).detach())
        torch.testing.assert_close(sample.reference[~late], frozen(sample.inputs[~late]).detach())


@pytest.mark.parametrize("augment", [None, torch.neg])
def test_state_goes_on_where_it_was(augment: object) -> None:
    model, x = mlp(), torch.randn(10, 4)
    anchors = AnchorBatch(
        model, x, batch_size=3, augment=augment, generator=torch.Generator().manual_seed(7)
    )
    shift(model)
    anchors.extend(torch.randn(4, 4))
    shift(model)
    other = AnchorBatch(model, torch.randn(2, 4), batch_size=2, augment=augment)
    other.load_state_dict(anchors.state_dict())
    other.batch_size = 3
    assert other.drift() == anchors.drift() > 0
    for step in range(3):
        for a, b in zip(anchors.sample(step), other.sample(step), strict=True):
            assert torch.equal(a, b)


def test_a_snapshot_is_of_its_moment() -> None:
    model, x = mlp(), torch.randn(6, 4)
    anchors = AnchorBatch(model, x, augment=torch.neg, generator=torch.Generator().manual_seed(7))
    shift(model)
    anchors.extend(torch.randn(5, 4))
    shift(model)
    drift, sample = anchors.drift(), anchors.sample(3)
    state = anchors.state_dict()
    anchors.refresh()
    anchors.reference.add_(1)
    anchors.inputs.add_(1)
    anchors.load_state_dict(state)
    state["reference"].zero_()
    state["inputs"].zero_()
    assert anchors.drift() == drift
    for a, b in zip(sample, anchors.sample(3), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def nan(x: Tensor) -> Tensor:
    return torch.full_like(x, math.nan)


def changed(state: dict[str, object], name: str, value: object) -> dict[str, object]:
    return {**state, name: value(state[name]) if callable(value) else value}


def other_network(state: dict[str, object], change: object) -> dict[str, object]:
    parameters, buffers = state["references"][0]
    return {**state, "references": [(change(parameters), buffers)]}


BROKEN_STATES = {
    "not a mapping": (lambda s: [s], "must be what AnchorBatch.state_dict"),
    "more": (lambda s: {**s, "weights": 1}, "unknown entries"),
    "inputs of NaN": (lambda s: changed(s, "inputs", nan), "NaN"),
    "inputs are none": (lambda s: changed(s, "inputs", None), "'inputs'"),
    "inputs of another width": (
        lambda s: changed(s, "inputs", lambda x: x[:, :2]),
        "another model",
    ),
    "inputs of another type": (lambda s: changed(s, "inputs", lambda x: x.long()), "another model"),
    "fewer inputs": (lambda s: changed(s, "inputs", lambda x: x[:2]), "'reference' .* 2 anchors"),
    "fewer than a batch": (lambda s: changed(s, "inputs", lambda x: x[:1]), "batch_size=2"),
    "reference of NaN": (lambda s: changed(s, "reference", nan), "'reference' holds NaN"),
    "reference of fewer rows": (lambda s: changed(s, "reference", lambda x: x[:2]), "'reference'"),
    "reference of integers": (lambda s: changed(s, "reference", lambda x: x.long()), "'reference'"),
    "a wider reference": (lambda s: changed(s, "reference", lambda x: x.repeat(1, 2)), "6 outputs"),
    "a flat reference": (lambda s: changed(s, "reference", lambda x: x[:, 0]), "'reference'"),
    "no networks": (lambda s: changed(s, "references", []), "augment"),
    "networks are none": (lambda s: changed(s, "references", None), "'references' must be a list"),
    "network of one part": (lambda s: changed(s, "references", [({},)]), "pair"),
    "network of NaN": (
        lambda s: other_network(s, lambda w: {k: nan(t) for k, t in w.items()}),
        "'0.weight' of reference network 0 holds NaN",
    ),
    "another network": (
        lambda s: other_network(s, lambda w: {k: t[:1] for k, t in w.items()}),
        "not those of the model",
    ),
    "network of fewer layers": (
        lambda s: other_network(s, lambda w: dict(list(w.items())[1:])),
        "not those of the model",
    ),
    "segments of another count": (lambda s: changed(s, "segments", lambda x: x[:3]), "'segments'"),
    "a segment without network": (lambda s: changed(s, "segments", lambda x: x + 1), "'segments'"),
    "segments of floats": (lambda s: changed(s, "segments", lambda x: x.float()), "'segments'"),
    "seed is a text": (lambda s: changed(s, "seed", "7"), "'seed'"),
    "seed below zero": (lambda s: changed(s, "seed", -7), "'seed'"),
    "route is a text": (lambda s: changed(s, "route", "7"), "'route'"),
    "route of other values": (
        lambda s: changed(s, "route", lambda r: {**r, "stale": -1}),
        "'route'",
    ),
}


@pytest.mark.parametrize("name", sorted(BROKEN_STATES))
def test_a_broken_state_is_refused_whole(name: str) -> None:
    broken, message = BROKEN_STATES[name]
    model = mlp()
    anchors = AnchorBatch(model, torch.randn(5, 4), batch_size=2, augment=torch.neg)
    shift(model)
    before, sample = anchors.state_dict(), anchors.sample(1)
    with pytest.raises(ValueError, match=f"^state: .*{message}"):
        anchors.load_state_dict(broken(anchors.state_dict()))
    for a, b in zip(sample, anchors.sample(1), strict=True):
        assert torch.equal(a, b)
    after = anchors.state_dict()
    assert before["seed"] == after["seed"]
    for key in ("inputs", "reference", "segments"):
        assert torch.equal(before[key], after[key])


def test_a_refresh_or_an_extension_that_fails_changes_nothing() -> None:
    model = mlp()
    anchors = AnchorBatch(model, torch.randn(5, 4), augment=torch.neg)
    before, weights = anchors.state_dict(), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    for fails in (anchors.refresh, lambda: anchors.extend(torch.randn(2, 4))):
        with pytest.raises(ValueError, match="not finite"):
            fails()
    model.load_state_dict(weights)
    assert len(anchors) == 5
    assert anchors.drift() == 0.0
    for key in ("inputs", "reference", "segments"):
        assert torch.equal(before[key], anchors.state_dict()[key])


def test_a_head_that_grew_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    anchors = AnchorBatch(model, torch.randn(5, 4))
    old, model[1] = model[1], nn.Linear(6, 5)
    with torch.no_grad():
        model[1].weight[:3], model[1].bias[:3] = old.weight, old.bias
    start = copy.deepcopy(model.state_dict())
    message = "^model: gives 5 outputs an anchor now, the reference has 3"
    for fails in (
        lambda: FIPOptimizer(model[1].parameters(), anchors),
        lambda: AnchorMetric(anchors, model[1].parameters(), form="forward"),
        anchors.drift,
        anchors.predictions_kept,
        lambda: anchors.extend(torch.randn(2, 4)),
    ):
        with pytest.raises(ValueError, match=message):
            fails()
    # What the message advises.
    anchors.refresh()
    assert anchors.drift() == 0.0
    held = AnchorBatch(model, anchors.inputs, output=lambda z: z[:, :3])
    assert held.drift() == 0.0
    assert all(torch.equal(start[k], v) for k, v in model.state_dict().items())


def test_a_fingerprint_is_of_the_reference_up_to_rounding() -> None:
    model = mlp()
    anchors = AnchorBatch(model, torch.randn(50, 4))
    first = anchors.fingerprint()
    assert first == anchors.fingerprint() == copy.deepcopy(anchors).fingerprint()
    assert same_reference(first, list(first))
    noisy = anchors.reference * (1 + 1e-7 * torch.randn_like(anchors.reference))
    assert same_reference(first, fingerprint_of(noisy))
    assert not same_reference(first, fingerprint_of(anchors.reference[:-1]))
    assert not same_reference(first, fingerprint_of(anchors.reference.flip(0)))
    assert not same_reference(first, fingerprint_of(anchors.reference.flip(1)))
    assert not same_reference(first, fingerprint_of(anchors.reference.reshape(25, -1)))
    for size in (1e-3, 1e-2, 1.0):
        moved = anchors.reference + size * torch.randn_like(anchors.reference)
        assert not same_reference(first, fingerprint_of(moved))
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    anchors.refresh()
    assert not same_reference(first, anchors.fingerprint())


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


class Returns(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.layer, self.value = nn.Linear(4, 3), value

    def forward(self, x: Tensor) -> object:
        return self.value(self.layer(x))


X = torch.zeros(3, 4)
NAN = torch.full((3, 4), math.nan)


@pytest.mark.parametrize(
    ("build_it", "error", "message"),
    [
        (lambda: AnchorBatch("model", X), TypeError, "^model: must be a torch.nn.Module, got str"),
        (
            lambda: AnchorBatch(mlp(), [[1.0]]),
            TypeError,
            r"^inputs\[0\]: must be a tensor, got list",
        ),
        (lambda: AnchorBatch(mlp(), 3), TypeError, "^inputs: must be a tensor, a tuple"),
        (
            lambda: AnchorBatch(mlp(), X[:0]),
            ValueError,
            r"^inputs: got shape \(0, 4\), which holds no anchor",
        ),
        (lambda: AnchorBatch(mlp(), ()), ValueError, "^inputs: got an empty tuple"),
        (lambda: AnchorBatch(mlp(), (X, X[:2])), ValueError, r"same number of anchors .*3.*2"),
        (
            lambda: AnchorBatch(mlp(), {"input": X, "y": X[:2]}),
            ValueError,
            "same number of anchors",
        ),
        (
            lambda: AnchorBatch(mlp(), (X, torch.zeros(3))),
            TypeError,
            "^inputs: Sequential cannot be called with 2 positional inputs .* no labels",
        ),
        (
            lambda: AnchorBatch(mlp(), {"x": X}),
            TypeError,
            r"^inputs: Sequential cannot be called with the keywords \['x'\]",
        ),
        (lambda: AnchorBatch(mlp(), NAN), ValueError, "^inputs: holds NaN"),
        (
            lambda: AnchorBatch(mlp(), X, output="logit"),
            ValueError,
            "^output: got 'logit'; choose one of",
        ),
        (
            lambda: AnchorBatch(mlp(), X, output=3),
            TypeError,
            "^output: must be a name or a callable",
        ),
        (
            lambda: AnchorBatch(mlp(), X, batch_size=4),
            ValueError,
            "^batch_size: 4 is more than the 3",
        ),
        (
            lambda: AnchorBatch(mlp(), X, batch_size=0),
            ValueError,
            "^batch_size: must be a positive integer",
        ),
        (
            lambda: AnchorBatch(mlp(), X, chunk_size=-1),
            ValueError,
            "^chunk_size: must be a positive integer",
        ),
        (lambda: AnchorBatch(mlp(), X, augment=3), TypeError, "^augment: must be callable"),
        (
            lambda: AnchorBatch(Returns(lambda y: y.argmax(1)), X),
            TypeError,
            "^model: .*got a torch.int64",
        ),
        (
            lambda: AnchorBatch(Returns(lambda y: y.to(torch.complex64)), X),
            TypeError,
            "^model: .*complex64",
        ),
        (lambda: AnchorBatch(Returns(lambda y: [y]), X), TypeError, "^model: its output must be"),
        (
            lambda: AnchorBatch(Returns(lambda y: {"scores": y}), X),
            TypeError,
            "^model: .*'logits'; got dict",
        ),
        (
            lambda: AnchorBatch(Returns(lambda y: y.sum()), X),
            ValueError,
            "^model: .*one row per anchor",
        ),
        (
            lambda: AnchorBatch(Returns(lambda y: y[:1]), X),
            ValueError,
            "^model: .*one row per anchor",
        ),
        (
            lambda: AnchorBatch(Returns(lambda y: y / 0), X),
            ValueError,
            "^model: its outputs .*not finite",
        ),
        (lambda: AnchorBatch(mlp(), X).drift("max"), ValueError, "^reduction: choose"),
        (lambda: AnchorBatch(mlp(), X).extend((X,)), TypeError, "^inputs: the anchors held"),
        (lambda: AnchorBatch(mlp(), X).load_state_dict({"seed": 1}), ValueError, "^state: lacks"),
    ],
)
def test_bad_input_is_named(build_it: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_it()


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
