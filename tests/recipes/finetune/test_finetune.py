"""``recipes.finetune`` from end to end: every method runs, and the figures are those of the networks."""

import copy
import math
from pathlib import Path

import pytest
import torch
from finetune_cases import SHORT, arguments, run

from recipes.finetune.case import evaluated, loss
from recipes.finetune.command import main
from recipes.finetune.heads import new_parameters
from recipes.finetune.measures import Measures
from recipes.finetune.methods import METHODS, register
from recipes.finetune.methods.method import Method, Run, Training, schedule, trained
from recipes.finetune.outputs import held
from recipes.finetune.settings import FinetuneSettings
from recipes.finetune.text_problem import EncoderProblem

SETTINGS = FinetuneSettings(
    steps=4,
    batch_size=8,
    anchors=12,
    anchor_batch=6,
    check=8,
    head=5,
    train=6,
    test=10,
    queries=15,
    index=20,
    max_tokens=12,
    rank=2,
)


def problem(tiny, adapter="lora", development=False, settings=SETTINGS, kinds=("birds", "boats")):
    model, texts = str(tiny / "model"), tiny / "texts"
    device = torch.device("cpu")
    return EncoderProblem(
        model, adapter, texts, kinds, settings, development=development, device=device
    )


def completed(settings, **changes):
    from recipes.common.recipe_settings import option_kinds

    return settings.completed(option_kinds(METHODS.values())).changed(**changes)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, run(tiny, out, "--seeds", "0", "1")


def test_every_method_leaves_figures_for_each_seed(finished):
    out, results = finished
    assert list(results["metrics"]) == list(METHODS)
    for method, found in results["metrics"].items():
        assert len(found["points"]) == (3 if method == "interpolation" else 1)
        for point in found["points"]:
            assert len(point["runs"]) == 2
            assert point["steps"] == 4
            assert point["drift"] > 0
    assert (out / "trade_off.png").stat().st_size > 0


def test_a_resumed_run_takes_over_what_is_finished(finished, tiny, capsys):
    out, results = finished
    (out / "seed-1" / "plain.json").unlink()
    again = run(tiny, out, "--seeds", "0", "1", "--resume")
    said = capsys.readouterr().out
    assert "seed 1, plain fine-tuning" in said
    assert "seed 0, plain fine-tuning lr" not in said.split("\n\n")[0]
    # The run that was repeated comes to the same network.
    before, after = (r["metrics"]["plain"]["points"][0]["runs"][1] for r in (results, again))
    for key in ("accuracy", "nll", "drift", "kept"):
        assert after[key] == pytest.approx(before[key], rel=1e-4)
    assert again["metrics"]["fip"] == results["metrics"]["fip"]


def test_another_configuration_is_not_resumed(finished, tiny, capsys):
    out, _ = finished
    with pytest.raises(SystemExit):
        main([*SHORT, *arguments(tiny, out), "--resume", "--rank", "3"])
    assert "rank 2 there, 3 asked for" in capsys.readouterr().err


@pytest.mark.parametrize("development", [False, True])
def test_no_text_is_in_two_parts(tiny, development):
    measured, given = set(), set()
    for seed in (0, 1):
        case, unseen = problem(tiny, development=development).start(seed)
        parts = [case.train.inputs, unseen.test.inputs, case.anchors, case.check, unseen.queries]
        rows = [texts(part) for part in parts]
        assert [len(part) for part in rows] == [12, 10, 12, 8, 15]
        assert len(set().union(*rows)) == sum(map(len, rows))
        measured |= {*rows[1], *rows[4]}
        given |= {*rows[0], *rows[2], *rows[3]}
    # What one seed learns is never what another one is measured on, but in development.
    assert development or not measured & given


def texts(inputs):
    """The tokens of each text, without padding."""
    rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
    return [tuple(t for t, there in zip(ids, mask, strict=True) if there) for ids, mask in rows]


def test_the_start_is_the_pretrained_network_with_a_head_that_fits(tiny):
    start = problem(tiny).start(0)
    case, unseen = start
    first = Measures(case, unseen).point(case.start)
    assert first["drift"] == 0
    assert first["kept"] == 100
    assert float(loss(case.start, case.train).detach()) < math.log(2)
    embeddings = evaluated(case.start, unseen.queries, held)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(15))


def test_padding_changes_no_embedding(tiny):
    case, _ = problem(tiny).start(0)
    few = {name: x[:5] for name, x in case.anchors.items()}
    longer = {name: torch.nn.functional.pad(x, (0, 4)) for name, x in few.items()}
    with torch.no_grad():
        a, b = (case.start(**inputs).held for inputs in (few, longer))
    assert torch.allclose(a, b, atol=1e-5)


def test_what_is_trained(tiny):
    lora, whole = (problem(tiny, adapter).start(0).case.start for adapter in ("lora", "none"))
    head = {id(p) for p in new_parameters(lora)}
    names = [n for n, p in lora.named_parameters() if p.requires_grad and id(p) not in head]
    assert names
    assert all("lora_" in name for name in names)
    frozen = [n for n, p in whole.named_parameters() if not p.requires_grad]
    assert frozen
    assert all("pooler" in name for name in frozen)
    assert not lora.training


def test_a_certificate_is_of_neighbours_and_of_embeddings(tiny):
    start = problem(tiny).start(0)
    case, unseen = start
    moved = copy.deepcopy(case.start)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for p in trained(moved):
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    found = Measures(case, unseen).point(moved)
    before, now = (evaluated(m, unseen.queries, held) for m in (case.start, moved))
    index = unseen.predictions.texts
    same = (before @ index.T).argmax(dim=1) == (now @ index.T).argmax(dim=1)
    assert 0 < int(same.sum()) < 15
    assert found["kept"] == pytest.approx(100 * float(same.double().mean()))
    assert found["drift"] == pytest.approx(
        float((now - before).square().sum(dim=1).mean()), rel=1e-5
    )
    assert found["certificate"]["overall"]["flips"]["count"] == 15 - int(same.sum())


def test_the_budget_holds_on_the_check_texts(tiny):
    case, _ = problem(tiny, "none").start(0)
    settings = completed(SETTINGS, eps=1.0, beta=30.0)
    done = finish(METHODS["fip"], case, settings, {"max_drift": 2e-3})
    assert done.account["drift_before"] > 2e-3
    before, now = (evaluated(m, case.check, held) for m in (case.start, done.model))
    assert float((now - before).square().sum(dim=1).mean()) <= 2e-3 * 1.001
    assert done.account["drift_after"] <= 2e-3


def finish(method, case, settings, choice):
    done = Run(method, case, settings, choice, seed=0)
    while not done.finished:
        done.advance()
    return done


def test_distillation_sees_the_anchors_of_the_path(tiny):
    case, _ = problem(tiny).start(0)
    from recipes.finetune.anchoring import anchors_of

    a, b = (
        anchors_of(copy.deepcopy(case.start), case, SETTINGS, seed=0, check=check)
        for check in (False, True)
    )
    for step in (0, 3):
        one, other = a.sample(step), b.sample(step)
        assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
        assert torch.allclose(one.reference, other.reference)


def test_a_weight_of_distillation_holds_the_embeddings(tiny):
    case, unseen = problem(tiny, "none").start(0)
    settings = completed(SETTINGS, steps=12)
    measures = Measures(case, unseen)
    drifts = [
        measures.point(finish(METHODS["distillation"], case, settings, choice).model)["drift"]
        for choice in ({"lr": 3e-3, "weight": 1e-3}, {"lr": 3e-3, "weight": 100.0})
    ]
    assert drifts[1] < 0.5 * drifts[0]


def test_interpolation_is_the_line_to_plain_fine_tuning(tiny):
    case, _ = problem(tiny).start(0)
    settings = completed(SETTINGS, shares=(0.25,))
    plain = finish(METHODS["plain"], case, settings, {"lr": 1e-3}).model
    line = METHODS["interpolation"]
    ((choice, between),) = line.networks(finish(line, case, settings, {"lr": 1e-3}), case, settings)
    assert choice == {"lr": 1e-3, "share": 0.25}
    for p, old, new in zip(trained(between), trained(case.start), trained(plain), strict=True):
        assert torch.allclose(p, old + 0.25 * (new - old), atol=1e-6)


class Ticking(Training):
    """Each step takes a second of a clock that the test moves, and so does the end."""

    share_of_steps = 0.75

    def __init__(self, clock):
        self.clock, self.rates = clock, []

    def step(self, batch, rate):
        self.clock[0] += 1.0
        self.rates.append(rate)

    def finish(self):
        self.clock[0] += 1.0
        return {"ended": True}


def test_a_run_ends_when_its_time_is_used_up(tiny, monkeypatch):
    case, _ = problem(tiny).start(0)
    clock = [0.0]
    monkeypatch.setattr("recipes.finetune.methods.method.time.process_time", lambda: clock[0])

    class Ticks(Method):
        title = "ticks"

        def choices(self, settings):
            return [{}]

        def begin(self, model, case, settings, choice, *, seed):
            clock[0] += 2.0
            return Ticking(clock)

    settings = FinetuneSettings(seconds=12.0, batch_size=8)
    done = finish(Ticks(), case, settings, {})
    # Two seconds to begin, steps until three quarters of twelve are used, and one second at the end.
    assert done.steps == 7
    assert done.seconds == 10.0
    assert done.account == {"ended": True}
    assert done.share == pytest.approx(10 / 9)


def test_the_rate_rises_and_falls():
    assert schedule(0.1) == 1
    assert schedule(1.0) == pytest.approx(0)
    assert 0 < schedule(0.0) < schedule(0.05) < 1
    assert schedule(0.1) > schedule(0.5) > schedule(0.9)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'fip' is registered already"):
        register("fip", METHODS["plain"])


def test_held_outputs_are_embeddings(tiny):
    case, _ = problem(tiny).start(0)
    with torch.no_grad():
        outputs = case.start(**case.check)
    assert outputs.held.shape == (8, 16)
    assert outputs.learnt.shape == (8, 2)
    assert Path(tiny / "model").exists()
