"""References that are kept in half precision or by networks, against those that are kept in full."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from languages import Language, batch, shift
from torch import Tensor, nn

from benchmarks.memory import LiveMemory
from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, restore

TEXTS = [batch(3, 20, seed=1), batch(5, seed=2), batch(30, 9, 12, seed=3)]
CHECK = [batch(4, seed=4), batch(17, seed=5)]


class Adapted(nn.Module):
    """A layer with an adapter that can be switched off, as PEFT's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(4, 3).double().requires_grad_(False)
        self.frozen, self.adapter = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
        self.frozen.requires_grad_(False)
        self.on = True
        nn.init.zeros_(self.adapter.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.on * (self.adapter(x) + self.frozen(x))

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        self.on = False
        try:
            yield
        finally:
            self.on = True
            self.frozen.requires_grad_(True)  # as PEFT does


def language_anchors(model: nn.Module, store: Any, **options: Any) -> AnchorBatch:
    return AnchorBatch(
        model,
        TEXTS,
        output="nats_per_token",
        store=store,
        generator=torch.Generator().manual_seed(3),
        **options,
    )


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(("store", "tolerance"), [("live", 1e-12), ("half", 1e-3)])
def test_what_is_measured_does_not_depend_on_the_store(
    store: str, tolerance: float, chunk_size: int | None
) -> None:
    model = Language()
    options = {"chunk_size": chunk_size, "batch_size": 3, "check": CHECK}
    full = language_anchors(model, "full", **options)
    other = language_anchors(model, store, **options)
    assert other.drift() <= (0.0 if store == "live" else 1e-6)
    for _ in range(2):
        shift(model)
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(other.drift("none"), full.drift("none"), **close)
        assert other.predictions_kept() == full.predictions_kept() < 1
        assert other.measure().drift == pytest.approx(full.measure().drift, rel=tolerance)
        assert other.check.measure().flips == full.check.measure().flips
        torch.testing.assert_close(other.reference, full.reference, **close)
        torch.testing.assert_close(other.all().reference, full.reference, **close)
        now = full.outputs(full.inputs)
        assert other.measure(now).drift == pytest.approx(full.measure(now).drift, rel=tolerance)
        for step in range(3):
            a, b = other.sample(step), full.sample(step)
            assert torch.equal(a.inputs["input_ids"], b.inputs["input_ids"])
            torch.testing.assert_close(a.reference, b.reference, **close)
        for anchors in (full, other):  # the anchors that are here keep their reference
            anchors.extend(batch(33, 2, seed=8), check=batch(10, 10, seed=9))
    assert len(other) == 10
    assert len(other.check) == 6
    for anchors in (full, other):
        anchors.refresh()
    assert other.drift() <= (0.0 if store == "live" else 1e-6)
    shift(model)
    assert other.drift() == pytest.approx(full.drift(), rel=tolerance)


@pytest.mark.parametrize("store", ["half", "live"])
def test_runs_and_settlements_do_not_depend_on_the_store(store: str) -> None:
    ends = []
    for kept in ("full", store):
        model = Language()
        anchors = language_anchors(model, kept, batch_size=3, check=CHECK)
        opt = FIPOptimizer(
            model.parameters(),
            anchors,
            beta="auto",
            eps=0.3,
            max_drift=0.02,
            check_every=None,
            form="double-vjp",  # a trace takes seconds
            generator=torch.Generator().manual_seed(0),
        )
        for _ in range(4):
            opt.zero_grad()
            model(**batch(6, 6, seed=9))["logits"].square().mean().backward()
            opt.step()
        before = anchors.check.drift()
        opt.settle()
        after = anchors.check.drift()
        assert after <= 0.02 < before
        ends.append((before, after))
    assert ends[0] == pytest.approx(ends[1], rel=1e-6 if store == "live" else 1e-2)


def test_a_network_that_has_changed_is_restored_to_a_live_reference() -> None:
    old, model = Language(), Language()
    shift(model, by=0.1)
    anchors = language_anchors(model, "live", reference=old, chunk_size=2)
    before = anchors.drift()
    found = restore(model, anchors, max_drift=before / 10, form="double-vjp")
    assert found.within
    assert anchors.drift() <= before / 10
    torch.testing.assert_close(
        anchors.reference, AnchorBatch(old, TEXTS, output="nats_per_token").reference
    )


def test_a_live_reference_module_is_not_copied_and_evaluated_in_eval_mode() -> None:
    torch.manual_seed(0)
    old = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    model, x = copy.deepcopy(old), torch.randn(9, 4, dtype=torch.float64)
    anchors = AnchorBatch(model, x, reference=old, store="live")
    shift(model)
    assert old.training
    expected = (model.eval()(x) - old.eval()(x)).square().sum(1).detach()
    torch.testing.assert_close(anchors.drift("none"), expected)
    assert anchors.reference.grad_fn is None
    own = {p.data_ptr() for p in (*model.parameters(), *old.parameters())}
    assert reachable(anchors, own) == x.numel()


@pytest.mark.parametrize("store", ["full", "live"])
@pytest.mark.parametrize("augment", [None, torch.neg])
def test_a_context_makes_the_model_its_own_reference(store: Any, augment: Any) -> None:
    model, x = Adapted(), torch.randn(9, 4, dtype=torch.float64)
    base = model.base
    anchors = AnchorBatch(
        model, x, reference=model.disabled, store=store, augment=augment, check=0.3
    )
    shift(model.adapter)
    expected = (model(anchors.inputs) - base(anchors.inputs)).square().sum(1).detach()
    torch.testing.assert_close(anchors.drift("none"), expected)
    sample = anchors.sample(1)
    torch.testing.assert_close(sample.reference, base(sample.inputs))
    # What requires a gradient is as it was.
    assert [p.requires_grad for p in model.frozen.parameters()] == [False, False]
    opt = FIPOptimizer(model.adapter.parameters(), anchors, eps=0.1, max_drift=100.0)
    opt.step()
    assert torch.equal(anchors.reference, base(anchors.inputs))
    own = {p.data_ptr() for p in model.parameters()}
    if store == "live" and augment is None:
        assert reachable(anchors, own) == x.numel()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_adapters_of_peft_are_switched_off_for_the_reference() -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=32,
        n_embd=8,
        n_layer=1,
        n_head=2,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    base = transformers.GPT2LMHeadModel(config)
    texts = [batch(3, 9), batch(12)]
    old = AnchorBatch(copy.deepcopy(base), texts, output="nats_per_token").reference
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, lora)
    anchors = AnchorBatch(
        model, texts, output="nats_per_token", reference=model.disable_adapter, store="live"
    )
    assert anchors.drift() == 0.0
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn_like(p))
    assert anchors.drift() > 1e-3
    torch.testing.assert_close(anchors.reference, old)
    assert all(p.requires_grad for p in trained)
    FIPOptimizer(trained, anchors, eps=0.1, form="double-vjp").step()
    torch.testing.assert_close(anchors.reference, old)


# --- memory -----------------------------------------------------------------------------------------------


def reachable(anchors: AnchorBatch, without: set[int]) -> int:
    """The number of numbers in float tensors that the anchors keep, but for some memory."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    todo: list[Any] = [anchors]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            if thing.is_floating_point():
                found[thing.data_ptr()] = thing.numel()
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, (list, tuple)):
            todo += thing
        else:
            todo += getattr(thing, "__dict__", {}).values()
            todo.append(getattr(thing, "__self__", None))
    return sum(size for pointer, size in found.items() if pointer not in without)


WIDE = 4_000


class Wide(nn.Module):
    """A small model with a large vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(WIDE, 2), nn.Linear(2, WIDE)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embedding(input_ids))


@pytest.mark.parametrize(("store", "references"), [("full", 1.0), ("half", 0.5), ("live", 0.0)])
def test_the_memory_of_a_store(store: Any, references: float) -> None:
    model, texts = Wide(), batch(*[10] * 16)
    outputs = 16 * 10 * WIDE * 4  # bytes of all outputs
    with LiveMemory() as construction:
        anchors = AnchorBatch(
            model, texts, output="nats_per_token", store=store, chunk_size=1, reference=Wide()
        )
    if store == "live":
        assert construction.peak < outputs / 2
    kept = 0 if anchors.references.outputs is None else anchors.references.outputs.nbytes
    assert kept == references * outputs
    with torch.no_grad():
        model.head.weight.add_(0.1)
    for measured in (anchors.drift, anchors.predictions_kept, anchors.measure):
        with LiveMemory() as memory:
            measured()
        assert 0 < memory.peak < outputs / 2


# --- states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["half", "live"])
def test_a_resumed_run_has_the_first_reference(store: Any, tmp_path: Any) -> None:
    model = Language()
    anchors = language_anchors(model, store, batch_size=2, check=CHECK)
    opt = FIPOptimizer(model.parameters(), anchors, eps=0.1, form="double-vjp")

    def steps() -> list[Tensor]:
        for _ in range(2):
            opt.step()
        return [p.detach().clone() for p in model.parameters()]

    steps()
    anchors.extend(batch(25, seed=7), check=batch(3, seed=6))
    first = anchors.reference
    saved = {
        "model": model.state_dict(),
        "opt": opt.state_dict(),
        "anchors": anchors.state_dict(),
    }
    torch.save(saved, tmp_path / "run.pt")
    expected = steps()
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    if store == "live":  # networks that the check inputs share are written once
        assert [isinstance(each, int) for each in saved["anchors"]["check"]["references"]] == [
            True,
            True,
        ]
    model = Language()
    model.load_state_dict(saved["model"])
    anchors = language_anchors(model, store, batch_size=2, check=CHECK)
    opt = FIPOptimizer(model.parameters(), anchors, eps=0.1, form="double-vjp")
    with pytest.raises(ValueError, match="other reference outputs"):
        opt.load_state_dict(saved["opt"])
    anchors.load_state_dict(saved["anchors"])
    assert torch.equal(anchors.reference, first)
    opt.load_state_dict(saved["opt"])
    assert all(torch.equal(a, b) for a, b in zip(steps(), expected, strict=True))


def test_a_given_network_is_not_part_of_the_state_and_recognised() -> None:
    old, model = Language(), Language()
    shift(model)
    anchors = language_anchors(model, "live", reference=old)
    state = anchors.state_dict()
    assert state["references"] == [None]
    assert state["reference"] is None
    same = language_anchors(model, "live", reference=copy.deepcopy(old))
    same.load_state_dict(state)
    assert same.drift() == anchors.drift() > 0
    assert same.fingerprint() == anchors.fingerprint()
    changed = copy.deepcopy(old)
    shift(changed, by=1e-3)
    other = language_anchors(model, "live", reference=changed)
    assert other.fingerprint() != anchors.fingerprint()
    before = other.drift()
    with pytest.raises(ValueError, match="^state: was saved with another reference network"):
        other.load_state_dict(state)
    assert other.drift() == before
    own = language_anchors(model, "live")
    with pytest.raises(ValueError, match="^state: its reference is a network that was given"):
        own.load_state_dict(state)
    full = language_anchors(model, "full")
    for one, two in ((own, full), (full, own)):
        with pytest.raises(ValueError, match="^state: store='live' was given for one of the two"):
            one.load_state_dict(two.state_dict())
    state = own.state_dict()
    for broken in ({"fingerprint": None}, {"fingerprint": (1.0,)}, {"references": []}):
        with pytest.raises(ValueError, match="^state: "):
            own.load_state_dict({**state, **broken})


@pytest.mark.parametrize("store", ["full", "half", "live"])
def test_copied_anchors_go_on_alone(store: Any) -> None:
    model = Language()
    anchors = language_anchors(model, store, check=0.3)
    shift(model)
    other = copy.deepcopy(anchors)
    assert other.drift() == anchors.drift()
    shift(model)
    assert other.drift() != anchors.drift()
    assert torch.equal(other.reference, anchors.reference)


# --- bad input -----------------------------------------------------------------------------------------------


class Halves(nn.Module):
    """Shares its parameter with another module."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, **inputs: Tensor) -> Any:
        return self.layer(**inputs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            lambda m: {"store": "disk"},
            ValueError,
            "^store: choose 'full', 'half', 'live' or a positive number of classes, got 'disk'",
        ),
        (
            lambda m: {"store": "live", "reference": torch.zeros(2, 88)},
            ValueError,
            "^store: 'live' takes no outputs as reference",
        ),
        (lambda m: {"store": 0}, ValueError, "^store: choose"),
        (lambda m: {"store": True}, ValueError, "^store: choose"),
        (
            lambda m: {"store": 3},
            ValueError,
            "^store: 3 of the classes can be told apart only with output one of .* got 'logits'",
        ),
        (
            lambda m: {"store": 11, "output": "probabilities"},
            ValueError,
            "^store: 11 classes cannot be told apart from others, as there are 11",
        ),
        (
            lambda m: {"store": "live", "reference": m},
            ValueError,
            "^reference: is the model itself, .* copy.deepcopy",
        ),
        (
            lambda m: {"store": "live", "reference": Halves(m)},
            ValueError,
            "^reference: shares 'layer.embedding.weight' .* require a gradient",
        ),
        (
            lambda m: {"store": "live", "reference": 3},
            TypeError,
            "^reference: with store='live' it must be a torch.nn.Module or a callable",
        ),
        (
            lambda m: {"reference": lambda: 3},
            TypeError,
            "^reference: a callable must return a context manager .* it returned int",
        ),
        (
            lambda m: {"store": "live", "reference": Wide()},
            ValueError,
            "^reference: has outputs of shape",
        ),
        (
            lambda m: {"store": "half", "output": lambda out: 1e6 * out["logits"]},
            ValueError,
            "^store: 'half' holds numbers up to 65504, but a reference output is",
        ),
        (
            lambda m: {"store": "live", "output": lambda out: out["logits"] / 0},
            ValueError,
            "^model: its outputs .* not finite",
        ),
    ],
)
def test_references_that_cannot_be_kept_so_are_refused(
    options: Any, error: type[Exception], message: str
) -> None:
    model = Language()
    with pytest.raises(error, match=message):
        AnchorBatch(model, batch(8, 3), **options(model))


@pytest.mark.parametrize("store", ["half", "live"])
def test_a_refresh_that_fails_changes_nothing(store: Any) -> None:
    model = Language()
    anchors = language_anchors(model, store, check=0.3)
    weights, reference = copy.deepcopy(model.state_dict()), anchors.reference
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    for fails in (anchors.refresh, lambda: anchors.extend(batch(3), check=batch(2))):
        with pytest.raises(ValueError, match="not finite"):
            fails()
    model.load_state_dict(weights)
    assert torch.equal(anchors.reference, reference)
    assert len(anchors) == len(reference)
    assert AnchorMetric(anchors).residual().square().sum() < 1e-6
