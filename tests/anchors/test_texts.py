"""Texts of different lengths: lists of batches, padded positions, output spaces that read the inputs."""

from __future__ import annotations

import functools
from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from languages import VOCABULARY, Language, batch, logits_alone, shift
from torch import Tensor, nn

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, certify
from fipoptim.anchors.output_space import output_map

BATCHES = [batch(3, 20, seed=1), batch(5, seed=2), batch(30, 9, 12, seed=3)]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def drifts(before: list[Tensor], after: list[Tensor]) -> Tensor:
    return torch.stack([(a - b).square().sum() for a, b in zip(before, after, strict=True)])


# --- lists of batches ---------------------------------------------------------------------------------


def test_batches_of_one_shape_are_joined() -> None:
    x = torch.randn(7, 4, dtype=torch.float64)
    anchors = AnchorBatch(mlp(), [x[:3], x[3:]])
    assert torch.equal(anchors.inputs, x)
    pairs = AnchorBatch(nn.Bilinear(4, 4, 2).double(), [(x[:3], x[:3]), (x[3:], x[3:])])
    assert all(torch.equal(part, x) for part in pairs.inputs)
    texts = AnchorBatch(Language(), [batch(3, 8), batch(8, 2)])
    assert texts.inputs["input_ids"].shape == (4, 8)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_drift_on_texts_of_different_lengths_is_that_of_each_text_alone(
    chunk_size: int | None,
) -> None:
    model = Language()
    before = logits_alone(model, *BATCHES)
    anchors = AnchorBatch(model, BATCHES, chunk_size=chunk_size)
    assert len(anchors) == 6
    assert anchors.drift() < 1e-25
    shift(model)
    after = logits_alone(model, *BATCHES)
    torch.testing.assert_close(anchors.drift("none"), drifts(before, after))
    kept = [bool((a.argmax(-1) == b.argmax(-1)).all()) for a, b in zip(before, after, strict=True)]
    assert 0 < sum(kept) < 6
    assert anchors.predictions_kept() == sum(kept) / 6
    found = anchors.measure()
    assert found.drift == pytest.approx(anchors.drift())
    assert found.flips == pytest.approx(1 - sum(kept) / 6)


def test_short_texts_are_not_computed_at_full_length() -> None:
    model = Language()
    anchors = AnchorBatch(model, [*BATCHES, batch(90)], chunk_size=2, batch_size=1)
    model.calls.clear()
    anchors.drift()
    # Lengths are rounded up to a multiple of 8.
    assert model.calls == [(2, 24), (2, 32), (2, 16), (1, 90)]
    for step in range(20):
        sample = anchors.sample(step)
        length = int(sample.inputs["attention_mask"].sum())
        assert sample.inputs["input_ids"].shape[1] == min(-(-length // 8) * 8, 90)
        assert sample.reference.shape == (1, 90 * VOCABULARY)
        torch.testing.assert_close(anchors.outputs(sample.inputs), sample.reference)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_products_on_texts_are_those_of_the_dense_matrix(chunk_size: int | None) -> None:
    model, batches = Language(), BATCHES[:2]
    anchors = AnchorBatch(model, batches, chunk_size=chunk_size)
    names = [name for name, _ in model.named_parameters()]

    def outputs(values: dict[str, Tensor]) -> Tensor:
        rows = []
        for each in batches:
            for ids, mask in zip(each["input_ids"], each["attention_mask"], strict=True):
                size = int(mask.sum())
                given = (ids[None, :size], mask[None, :size])
                rows.append(torch.func.functional_call(model, values, given)["logits"].flatten())
        return torch.cat(rows)

    values = {name: p.detach() for name, p in model.named_parameters()}
    jacobians = torch.func.jacrev(outputs)(values)
    jacobian = torch.cat([jacobians[name].flatten(1) for name in names], dim=1)
    expected = jacobian.T @ jacobian / 3
    for trace in {False, chunk_size is None}:  # a trace for each shape of chunk takes seconds
        metric = AnchorMetric(anchors, trace=trace)
        torch.testing.assert_close(metric.dense(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(metric.diagonal(), expected.diagonal(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("check", [0.4, [batch(4, 40, seed=7), batch(11, seed=8)]])
def test_a_budget_on_texts_is_held(check: Any) -> None:
    model = Language()
    anchors = AnchorBatch(model, BATCHES, check=check, batch_size=2)
    opt = FIPOptimizer(
        model.parameters(),
        anchors,
        beta=3.0,
        eps=0.3,
        max_flips=0.5,
        max_drift=4.0,
        form="double-vjp",
    )
    for _ in range(3):
        opt.zero_grad()
        model(**batch(6, 6, seed=9))["logits"].square().mean().backward()
        opt.step()
    assert 0 < anchors.check.drift() <= 4.0
    assert anchors.check.predictions_kept() >= 0.5


def test_a_loader_may_have_batches_of_different_lengths() -> None:
    model = Language()
    loader = [UserDict({**each, "labels": each["input_ids"]}) for each in BATCHES]
    anchors = AnchorBatch.from_loader(model, loader, 4)
    assert anchors.inputs.keys() == {"input_ids", "attention_mask"}
    before = logits_alone(model, *BATCHES)[:4]
    shift(model)
    expected = drifts(before, logits_alone(model, *BATCHES)[:4])
    torch.testing.assert_close(anchors.drift("none"), expected)


def test_a_loader_of_tuples_gives_positional_inputs() -> None:
    x = torch.randn(4, 4, dtype=torch.float64)
    # torch's collation makes lists of tuples.
    anchors = AnchorBatch.from_loader(nn.Bilinear(4, 4, 2).double(), [[[x, x], x[:, 0]]], 3)
    assert isinstance(anchors.inputs, tuple)
    assert all(torch.equal(part, x[:3]) for part in anchors.inputs)


@pytest.mark.parametrize("length", [4, 30, 50])
def test_anchors_are_extended_by_longer_and_shorter_texts(length: int) -> None:
    model = Language()
    batches = [batch(20, 7, seed=1), batch(length, 2, seed=2)]
    first = logits_alone(model, batches[0])
    anchors = AnchorBatch(model, batches[0], chunk_size=1)
    shift(model)
    second = logits_alone(model, batches[1])
    anchors.extend(batches[1])
    shift(model, by=0.1)
    expected = drifts(first + second, logits_alone(model, *batches))
    torch.testing.assert_close(anchors.drift("none"), expected)
    assert anchors.reference.shape == (4, max(20, length) * VOCABULARY)


def test_augmented_texts_keep_the_width_of_the_anchors() -> None:
    model, frozen = Language(), Language()

    def shorter(texts: dict[str, Tensor]) -> dict[str, Tensor]:
        assert type(texts) is dict
        return {name: x[:, 1:] for name, x in texts.items()}

    anchors = AnchorBatch(model, BATCHES, batch_size=3, augment=shorter)
    shift(model)
    sample = anchors.sample(0)
    assert sample.reference.shape == (3, 30 * VOCABULARY)
    expected = [
        torch.cat([z.flatten(), z.new_zeros(30 * VOCABULARY - z.numel())])
        for z in logits_alone(frozen, sample.inputs)
    ]
    torch.testing.assert_close(sample.reference, torch.stack(expected))
    longer = AnchorBatch(
        model,
        BATCHES,
        augment=lambda texts: {name: torch.cat([x, x], 1) for name, x in texts.items()},
    )
    with pytest.raises(ValueError, match="^augment: made texts of 60 positions, but .* 30"):
        longer.sample(0)


@pytest.mark.parametrize("augment", [None, lambda texts: dict(texts)])
def test_texts_continue_from_a_saved_state(augment: Any, tmp_path: Any) -> None:
    model = Language()
    options = {"batch_size": 2, "augment": augment}
    anchors = AnchorBatch(model, BATCHES, check=0.34, **options)
    shift(model)
    torch.save(anchors.state_dict(), tmp_path / "state.pt")
    other = AnchorBatch(model, BATCHES[:1], check=BATCHES[1], **options)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.fingerprint() == anchors.fingerprint()
    assert other.drift() == anchors.drift() > 0
    assert other.check.drift() == anchors.check.drift() > 0
    for step in range(3):
        a, b = anchors.sample(step), other.sample(step)
        assert torch.equal(a.reference, b.reference)
        assert all(torch.equal(x, b.inputs[name]) for name, x in a.inputs.items())


# --- padded positions ----------------------------------------------------------------------------------


def test_padded_positions_do_not_count() -> None:
    model, texts = Language(), batch(3, 8)
    anchors = AnchorBatch(model, texts)
    assert "11 positions that count" in repr(anchors)
    before = logits_alone(model, texts)
    shift(model)
    expected = drifts(before, logits_alone(model, texts))
    torch.testing.assert_close(anchors.drift("none"), expected)
    z = anchors.outputs(anchors.inputs).reshape(2, 8, VOCABULARY)
    assert not z[0, 3:].any()
    assert not anchors.reference.reshape(2, 8, VOCABULARY)[0, 3:].any()
    jv = AnchorMetric(anchors).jvp(torch.ones(sum(p.numel() for p in model.parameters())).double())
    assert jv.reshape(2, 8, VOCABULARY)[0, :3].all()
    assert not jv.reshape(2, 8, VOCABULARY)[0, 3:].any()


def test_a_prediction_at_a_padded_position_is_not_lost() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = nn.Parameter(torch.randn(2, 4, 3))

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.z

    model, texts = Table(), batch(2, 4)
    given = torch.randn(2, 4, 3)  # also at padded positions
    anchors = AnchorBatch(model, texts, reference=given)
    with torch.no_grad():
        model.z.copy_(given)
        model.z[0, 2:] = -given[0, 2:]
    assert anchors.drift() == 0.0
    assert anchors.predictions_kept() == 1.0
    with torch.no_grad():
        model.z[0, 1] = -given[0, 1]
    assert anchors.predictions_kept() == 0.5


def test_pooled_outputs_are_left_alone() -> None:
    model, texts = Language(pooled=True), batch(3, VOCABULARY)
    with torch.no_grad():
        expected = model(**texts)["logits"]
    assert expected.shape == texts["attention_mask"].shape
    assert torch.equal(AnchorBatch(model, texts).reference, expected)
    ragged = AnchorBatch(model, [texts, batch(40)], chunk_size=1)
    assert ragged.reference.shape == (3, VOCABULARY)
    torch.testing.assert_close(ragged.reference[:2], expected)
    ragged.extend(batch(50, 60))
    assert ragged.reference.shape == (5, VOCABULARY)


def test_a_model_without_a_head_gives_its_hidden_states() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, 4)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return SimpleNamespace(last_hidden_state=self.embedding(input_ids))

    model, texts = Backbone(), batch(3, 8)
    anchors = AnchorBatch(model, texts)
    hidden = model.embedding(texts["input_ids"]) * texts["attention_mask"].unsqueeze(-1)
    assert torch.equal(anchors.reference, hidden.detach().flatten(1))
    with pytest.raises(TypeError, match="^model: .* carry one at 'logits'; got SimpleNamespace"):
        AnchorBatch(model, texts, output="probabilities")


# --- output spaces ----------------------------------------------------------------------------------------


def mean_pooled(output: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    counts = inputs["attention_mask"].unsqueeze(-1)
    return (output["logits"] * counts).sum(1) / counts.sum(1)


def test_an_output_space_reads_the_inputs_of_its_rows() -> None:
    model = Language()
    anchors = AnchorBatch(model, BATCHES, output=mean_pooled, chunk_size=2)
    expected = torch.stack([z.mean(0) for z in logits_alone(model, *BATCHES)])
    torch.testing.assert_close(anchors.reference, expected)
    shift(model)
    torch.testing.assert_close(
        AnchorMetric(anchors, form="forward", trace=False).outputs,
        torch.stack([z.mean(0) for z in logits_alone(model, *BATCHES)]),
    )


def test_an_output_space_gets_what_the_model_was_given() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            x.zero_()
            return z

    x = torch.randn(5, 4)
    anchors = AnchorBatch(Overwrites(), x, output=lambda z, inputs: torch.cat([z, inputs], 1))
    assert torch.equal(anchors.reference[:, 3:], x)


@pytest.mark.parametrize(
    ("function", "takes_inputs"),
    [
        (lambda z: z, False),
        (lambda z, inputs: z, True),
        (lambda z, inputs, scale=1.0: z, True),
        (lambda z, scale=1.0: z, False),
        (lambda *z: z[0], False),
        (lambda z, *more: z, False),
        (functools.partial(lambda a, z, inputs: z, 0), True),
        (nn.Identity(), False),
        (torch.sin, False),
    ],
)
def test_the_signature_says_whether_an_output_space_takes_the_inputs(
    function: Any, takes_inputs: bool
) -> None:
    assert output_map(function).takes_inputs == takes_inputs


def kl(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """The KL divergence of each text, averaged over its tokens."""
    return torch.stack(
        [
            (b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum(-1).mean()
            for b, a in zip(before, after, strict=True)
        ]
    )


@pytest.mark.parametrize("given", [BATCHES, BATCHES[2]])
def test_nats_per_token_is_the_kl_divergence_of_a_token(given: Any) -> None:
    model = Language()
    batches = given if isinstance(given, list) else [given]
    before = logits_alone(model, *batches)
    anchors = AnchorBatch(model, given, output="nats_per_token", chunk_size=2)
    # Each text's probabilities are on a sphere of squared radius 2.
    norms = anchors.reference.square().sum(1)
    torch.testing.assert_close(norms, torch.full_like(norms, 2.0))
    shift(model, by=1e-3)
    expected = kl(before, logits_alone(model, *batches))
    torch.testing.assert_close(anchors.drift("none"), expected, rtol=1e-2, atol=0)
    shift(model)
    a, b = before, logits_alone(model, *batches)
    hellinger = [
        2 * (x.softmax(-1).sqrt() - y.softmax(-1).sqrt()).square().sum(-1).mean()
        for x, y in zip(a, b, strict=True)
    ]
    torch.testing.assert_close(anchors.drift("none"), torch.stack(hellinger))


def test_nats_per_token_of_one_token_a_text() -> None:
    model, x = mlp(), torch.randn(5, 4, dtype=torch.float64)
    anchors = AnchorBatch(model, x, output="nats_per_token")
    before = model(x).detach()
    shift(model, by=1e-3)
    expected = kl(list(before[:, None]), list(model(x).detach()[:, None]))
    torch.testing.assert_close(anchors.drift("none"), expected, rtol=1e-2, atol=0)


def test_a_certificate_on_texts_of_different_lengths() -> None:
    pytest.importorskip("scipy")
    model, old = Language(), Language()
    shift(model)
    found = certify(model, old, BATCHES, chunk_size=2)
    expected = drifts(logits_alone(old, *BATCHES), logits_alone(model, *BATCHES))
    assert found.drift.rate == pytest.approx(float(expected.mean()))


# --- bad input ----------------------------------------------------------------------------------------------


X = torch.zeros(3, 4, dtype=torch.float64)
TEXTS = batch(3, 8)


@pytest.mark.parametrize(
    ("build_it", "error", "message"),
    [
        (lambda: AnchorBatch(mlp(), []), ValueError, "^inputs: got an empty list"),
        (lambda: AnchorBatch(mlp(), [3]), TypeError, r"^inputs\[0\]: must be a tensor, got int; a"),
        (
            lambda: AnchorBatch(mlp(), [X, (X, X)]),
            TypeError,
            r"^inputs\[1\]: all batches must be of one form",
        ),
        (
            lambda: AnchorBatch(mlp(), [X, torch.zeros(3, 5)]),
            ValueError,
            r"^inputs: batches of different shapes .* 'attention_mask' of shape \(N, T\).*tokenizer",
        ),
        (
            lambda: AnchorBatch(Language(), [{"input_ids": b["input_ids"]} for b in BATCHES]),
            ValueError,
            "^inputs: batches of different shapes .* 'attention_mask'",
        ),
        (
            lambda: AnchorBatch.from_loader(mlp(), [X, torch.zeros(3, 5)], 6),
            ValueError,
            "^loader: batches of different shapes .* 'attention_mask'",
        ),
        (
            lambda: AnchorBatch(
                Language(),
                [
                    {**b, "extra": torch.zeros(len(b["input_ids"]), i)}
                    for i, b in enumerate(BATCHES)
                ],
            ),
            ValueError,
            "^inputs: 'extra' has another shape in another batch",
        ),
        (
            lambda: AnchorBatch(Language(), {**TEXTS, "attention_mask": torch.ones(2, 7)}),
            ValueError,
            r"^inputs\['attention_mask'\]: has 7 positions, but 'input_ids' has 8",
        ),
        (
            lambda: AnchorBatch(Language(), {**TEXTS, "attention_mask": torch.ones(2)}),
            ValueError,
            r"^inputs\['attention_mask'\]: must have shape \(N, T\), one row a text, got \(2,\)",
        ),
        (
            lambda: AnchorBatch(Language(), {**TEXTS, "attention_mask": -torch.ones(2, 8)}),
            ValueError,
            r"^inputs\['attention_mask'\]: must hold 1 where .* got values from -1.0 to -1.0",
        ),
        (
            lambda: AnchorBatch(Language(), {**TEXTS, "labels": TEXTS["input_ids"]}),
            ValueError,
            "^inputs: holds 'labels', .* drop them",
        ),
        (
            lambda: AnchorBatch(Language(), [TEXTS, {**TEXTS, "label": torch.zeros(2)}]),
            ValueError,
            r"^inputs\[1\]: holds 'label'",
        ),
        (
            lambda: AnchorBatch(Language(), {**TEXTS, "input_ids": TEXTS["input_ids"] + 3}),
            ValueError,
            "^inputs: has the token 13, but the model's table of embeddings has 11 rows",
        ),
        (
            lambda: AnchorBatch(Language(), TEXTS).extend(
                {**TEXTS, "input_ids": TEXTS["input_ids"] - 3}
            ),
            ValueError,
            "^inputs: has the token -2, but",
        ),
        (
            lambda: AnchorBatch(Language(masked=False), BATCHES),
            ValueError,
            "^model: the outputs of a text change by .* if it is padded.*'attention_mask'",
        ),
        (
            lambda: AnchorBatch(Language(), BATCHES, output=lambda out: out["logits"].sum(-1)),
            ValueError,
            r"^model: gives outputs of shape \(1, 8\) for a text of 8 positions.*unsqueeze\(-1\)",
        ),
        (
            lambda: AnchorBatch(Language(), BATCHES, output=lambda out: out["logits"].sum(1)),
            ValueError,
            "^model: the outputs of a text change by",
        ),
        (
            lambda: AnchorBatch(mlp(), X, output=lambda a, b, c: a),
            TypeError,
            "^output: must take one argument, .* or two, .* got one with 3",
        ),
    ],
)
def test_bad_texts_are_refused(build_it: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_it()


def test_the_error_about_another_vocabulary_names_it() -> None:
    model = Language()
    anchors = AnchorBatch(model, BATCHES)
    old, model.head = model.head, nn.Linear(5, VOCABULARY + 2).double()
    for fails in (anchors.drift, anchors.predictions_kept, lambda: anchors.extend(TEXTS)):
        with pytest.raises(ValueError, match=r"^model: .*resize_token_embeddings"):
            fails()
    model.head = old
    assert anchors.drift() < 1e-25
