"""A store of the k likeliest classes: the others count as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from languages import VOCABULARY, Language, batch, logits_alone, shift
from torch import Tensor, nn

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, certify, restore

TEXTS = [batch(3, 20, seed=1), batch(5, seed=2), batch(30, 9, 12, seed=3)]
CHECK = [batch(4, seed=4), batch(17, seed=5)]


def put_together(logits: Tensor, classes: Tensor) -> Tensor:
    """The probabilities ``(T, k + 1)`` of the classes and of all others."""
    p = logits.softmax(-1)
    chosen = p.gather(-1, classes)
    return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], dim=-1)


def expected_drifts(before: list[Tensor], after: list[Tensor], k: int) -> Tensor:
    found = []
    for b, a in zip(before, after, strict=True):
        classes = b.topk(k).indices
        old, new = put_together(b, classes).sqrt(), put_together(a, classes).sqrt()
        found.append(2 * (old - new).square().sum(-1).mean())
    return torch.stack(found)


def anchors_of(model: nn.Module, store: Any = 3, **options: Any) -> AnchorBatch:
    return AnchorBatch(model, TEXTS, output="nats_per_token", store=store, **options)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("k", [1, 4])
def test_the_other_classes_count_as_one(k: int, chunk_size: int | None) -> None:
    model = Language()
    before = logits_alone(model, *TEXTS)
    anchors = anchors_of(model, k, chunk_size=chunk_size, batch_size=2)
    assert anchors.reference.shape == (6, 30 * (k + 1))
    assert anchors.drift() < 1e-25
    shift(model)
    after = logits_alone(model, *TEXTS)
    torch.testing.assert_close(anchors.drift("none"), expected_drifts(before, after, k))
    full = anchors_of(model, "full", reference=_unmoved())
    assert anchors.drift() <= full.drift()  # what is put together cannot be told apart
    kept = [
        bool((a.gather(-1, b.topk(k).indices).argmax(-1) == 0).all())
        for b, a in zip(before, after, strict=True)
    ]
    assert anchors.predictions_kept() == sum(kept) / 6
    for step in range(3):
        sample = anchors.sample(step)
        torch.testing.assert_close(_unmoved_outputs(sample.inputs), sample.reference)
    later = batch(40, 2, seed=7)
    then = logits_alone(model, later)
    anchors.extend(later)
    shift(model, by=0.1)
    expected = expected_drifts(before + then, logits_alone(model, *TEXTS, later), k)
    torch.testing.assert_close(anchors.drift("none"), expected)
    anchors.refresh()
    assert anchors.drift() < 1e-25


def _unmoved() -> nn.Module:
    return Language()


def _unmoved_outputs(inputs: Any) -> Tensor:
    model = _unmoved()
    return AnchorBatch(model, TEXTS, output="nats_per_token").outputs(inputs)


def test_products_are_those_of_the_classes_put_together() -> None:
    model = Language()
    texts = TEXTS[0]
    anchors = AnchorBatch(model, texts, output="nats_per_token", store=3)
    classes = [z.topk(3).indices for z in logits_alone(model, texts)]
    shift(model, by=0.1)

    def outputs(values: dict[str, Tensor]) -> Tensor:
        rows = []
        for ids, mask, chosen in zip(
            texts["input_ids"], texts["attention_mask"], classes, strict=True
        ):
            size = int(mask.sum())
            given = (ids[None, :size], mask[None, :size])
            logits = torch.func.functional_call(model, values, given)["logits"][0]
            rows.append((2 * put_together(logits, chosen) / size).sqrt().flatten())
        return torch.cat(rows)

    values = {name: p.detach() for name, p in model.named_parameters()}
    jacobians = torch.func.jacrev(outputs)(values)
    jacobian = torch.cat([jacobians[name].flatten(1) for name in values], dim=1)
    for trace in (True, False):
        dense = AnchorMetric(anchors, trace=trace).dense()
        torch.testing.assert_close(dense, jacobian.T @ jacobian / 2, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("form", ["tensor", "tuple"])
def test_inputs_of_any_form_have_their_likely_classes(form: str) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 5).double()

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            assert type(x) is Tensor
            return self.layer(x if y is None else x + y)

    model, x = Pair(), torch.randn(6, 4, dtype=torch.float64)
    given = x if form == "tensor" else (x, x)
    anchors = AnchorBatch(
        model, given, output="probabilities", store=2, check=0.34, augment=lambda inputs: inputs
    )
    assert anchors.reference.shape == (4, 3)
    opt = FIPOptimizer(model.parameters(), anchors, eps=0.5, max_drift=0.5, form="double-vjp")
    for _ in range(3):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    assert 0 < anchors.check.drift() <= 0.5
    assert anchors.drift() > 0
    anchors.extend(given, check=given)
    assert len(anchors) == 10
    with pytest.raises(TypeError, match="^inputs: the anchors held are"):
        anchors.extend({"x": x}, check=0.5)


def test_a_network_is_restored_to_its_likely_classes_from_a_saved_state(tmp_path: Any) -> None:
    old, model = Language(), Language()
    shift(model, by=0.1)
    anchors = anchors_of(model, 4, reference=old, check=CHECK, batch_size=2)
    torch.save(anchors.state_dict(), tmp_path / "anchors.pt")
    before = anchors.check.drift()
    other = anchors_of(model, 4, check=CHECK, batch_size=2)
    assert other.fingerprint() != anchors.fingerprint()
    other.load_state_dict(torch.load(tmp_path / "anchors.pt", weights_only=True))
    assert other.fingerprint() == anchors.fingerprint()
    assert other.check.drift() == before > 0
    a, b = anchors.sample(2), other.sample(2)
    assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)
    assert torch.equal(a.reference, b.reference)
    found = restore(model, other, max_drift=before / 4, form="double-vjp")
    assert found.within
    assert anchors.check.drift() <= before / 4


def test_a_certificate_knows_anchors_with_classes() -> None:
    pytest.importorskip("scipy")
    model = Language()
    anchors = AnchorBatch(model, TEXTS[2], output="nats_per_token", store=VOCABULARY - 1)
    with pytest.warns(UserWarning, match="^inputs: 3 of 3 are anchors"):
        certify(model, Language(), TEXTS[2])
    assert len(anchors) == 3
