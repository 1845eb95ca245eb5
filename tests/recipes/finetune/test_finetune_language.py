"""``recipes.finetune`` on a causal language model: next tokens are learnt, and held in nats per token."""

import json

import pytest
import torch
from finetune_cases import SHORT, arguments

from recipes.finetune.case import loss
from recipes.finetune.command import main
from recipes.finetune.measures import Measures
from recipes.finetune.settings import FinetuneSettings
from recipes.finetune.text_problem import LanguageProblem

SIZES = {"anchors": 12, "anchor_batch": 6, "check": 8, "train": 6, "head": 5, "test": 10}
SETTINGS = FinetuneSettings(steps=3, batch_size=8, queries=15, index=20, max_tokens=12, **SIZES)


@pytest.fixture(scope="module")
def start(tiny):
    folders = str(tiny / "gpt2"), "none", tiny / "texts"
    device = torch.device("cpu")
    return LanguageProblem(
        *folders, ["birds", "boats"], SETTINGS, development=False, device=device
    ).start(0)


def test_every_method_runs(tiny, tmp_path):
    given = [*arguments(tiny, tmp_path), "--model", str(tiny / "gpt2"), "--adapter", "none"]
    assert main([*SHORT, *given]) == 0
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert all(p["drift"] > 0 for found in metrics.values() for p in found["points"])
    path = metrics["fip"]["points"][0]["runs"][0]
    assert path["account"]["drift_after"] <= 0.02


def test_labels_are_the_next_tokens_and_padding_has_none(start):
    train = start.case.train
    ids, mask = train.inputs["input_ids"], train.inputs["attention_mask"]
    for row in range(len(train)):
        length = int(mask[row].sum())
        assert train.labels[row, : length - 1].tolist() == ids[row, 1:length].tolist()
        assert set(train.labels[row, length - 1 :].tolist()) <= {-100}
    assert int(mask.sum(dim=1).min()) < mask.shape[1]


def test_the_loss_is_the_mean_over_tokens(start):
    model, batch = start.case.start, start.case.train.at(torch.arange(4))
    with torch.no_grad():
        p = model(**batch.inputs).learnt.log_softmax(dim=-1)
        by_hand = [
            -float(p[row, at, label])
            for row, labels in enumerate(batch.labels.tolist())
            for at, label in enumerate(labels)
            if label != -100
        ]
        assert float(loss(model, batch)) == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def test_drift_is_the_divergence_in_nats_per_token(start):
    case, unseen = start
    measures = Measures(case, unseen)
    old = [p.clone() for p in case.start.parameters()]
    mask = unseen.queries["attention_mask"]
    with torch.no_grad():
        before = case.start(**unseen.queries).learnt.log_softmax(dim=-1)
        generator = torch.Generator().manual_seed(0)
        for p in case.start.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
        now = case.start(**unseen.queries).learnt.log_softmax(dim=-1)
        found = measures.point(case.start)
        for p, q in zip(case.start.parameters(), old, strict=True):
            p.copy_(q)
    divergence = (before.exp() * (before - now)).sum(dim=-1) * mask
    nats = float((divergence.sum(dim=1) / mask.sum(dim=1)).mean())
    assert found["drift"] == pytest.approx(nats, rel=0.1)
    same = ((before.argmax(dim=-1) == now.argmax(dim=-1)) | (mask == 0)).all(dim=1)
    assert found["kept"] == pytest.approx(100 * float(same.double().mean()))
