"""FIPCallback in the Trainer of transformers."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_texts import OLD, Classifier, dataset, inputs
from transformers import Trainer, TrainerCallback, TrainingArguments

from fipoptim import AnchorBatch, FIPOptimizer
from fipoptim.integrations.transformers import FIPCallback

DATA = dataset()
MAX_DRIFT = 0.01


def arguments(folder, **options):
    options = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "max_grad_norm": 0} | options
    options = {"per_device_train_batch_size": 8} | options
    return TrainingArguments(
        str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


def held(model, seed=1, **options):
    generator = torch.Generator().manual_seed(seed)
    anchors = AnchorBatch(model, inputs(OLD), check=0.4, batch_size=6, generator=generator)
    options = {"max_drift": MAX_DRIFT, "check_every": None} | options
    return FIPOptimizer(model.parameters(), anchors, beta=10.0, eps=0.3, momentum=0.5, **options)


def trainer(folder, optimizer, *callbacks, model=None, **options):
    return Trainer(
        model or optimizer.anchors.model,
        arguments(folder, **options),
        train_dataset=DATA,
        eval_dataset=DATA[:8],
        optimizers=(optimizer, None),
        callbacks=[FIPCallback(), *callbacks],
    )


class Watcher(TrainerCallback):
    """Keeps what a reporter behind FIPCallback sees, and the drift at each evaluation and checkpoint."""

    def __init__(self, optimizer):
        self.optimizer, self.logs, self.drift = optimizer, [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_evaluate(self, args, state, control, **kwargs):
        self.drift.append(self.optimizer.anchors.check.drift())

    on_save = on_evaluate


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole = held(Classifier())
    trainer(tmp_path, whole).train()
    model = Classifier()
    model.load_state_dict(whole.anchors.model.state_dict())  # trained weights
    resumed = held(model, seed=7)  # other anchors are drawn, and the reference is another
    assert not torch.equal(resumed.anchors.reference, whole.anchors.reference)
    trainer(tmp_path / "b", resumed).train(str(tmp_path / "checkpoint-2"))
    for p, q in zip(whole.anchors.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(resumed.anchors.reference, whole.anchors.reference)
    assert resumed.last_step == whole.last_step
    assert resumed.anchors.drift() == whole.anchors.drift() > 0


def test_what_is_evaluated_and_saved_is_within_the_budget_and_the_logs_say_so(tmp_path):
    optimizer = held(Classifier())
    watcher = Watcher(optimizer)
    runs = trainer(tmp_path, optimizer, watcher, eval_strategy="steps", eval_steps=1, max_steps=3)
    runs.train()
    assert len(watcher.drift) == 5  # three evaluations, and checkpoints after two and three steps
    assert max(watcher.drift) <= MAX_DRIFT
    saved = Classifier()
    saved.load_state_dict(load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    reference = optimizer.anchors.check
    z = saved.eval()(**reference.inputs)["logits"]
    assert (z - reference.reference).square().sum(1).mean() <= MAX_DRIFT * (1 + 1e-4)
    losses = [logs for logs in watcher.logs if "loss" in logs]
    assert len(losses) == 3
    assert all(logs["drift"] <= logs["max_drift"] == MAX_DRIFT for logs in losses)
    assert any(logs["settle_drift_before"] > MAX_DRIFT for logs in losses)
    assert all(0 <= logs["flips"] <= 1 and "max_flips" not in logs for logs in losses)
    history = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text("utf-8"))
    assert history["log_history"][0]["drift"] == losses[0]["drift"]
    assert "drift" not in next(logs for logs in watcher.logs if "eval_loss" in logs)


def test_the_network_that_is_left_is_the_best_one_and_within(tmp_path):
    optimizer = held(Classifier())
    schedule = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    runs = trainer(tmp_path, optimizer, load_best_model_at_end=True, **schedule)
    runs.train()
    best = load_file(Path(runs.state.best_model_checkpoint) / "model.safetensors")
    for name, p in optimizer.anchors.model.named_parameters():
        assert torch.equal(p, best[name])
    assert optimizer.anchors.check.drift() <= MAX_DRIFT


def test_accumulated_batches_are_one_batch(tmp_path):
    found = []
    for accumulated in (1, 2):
        model = Classifier(dropout=0.0)
        optimizer = held(model, max_drift=None)
        runs = trainer(
            tmp_path, optimizer, gradient_accumulation_steps=accumulated, max_steps=1, save_steps=9
        )
        runs.args.per_device_train_batch_size //= accumulated
        runs._train_batch_size = 8 // accumulated
        runs.train()
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


class SavesLate(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 1


def test_a_checkpoint_that_is_not_settled_is_told(tmp_path, caplog):
    optimizer = held(Classifier())
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, optimizer, SavesLate(), max_steps=2, save_strategy="no").train()
    assert "checkpoint-1 was saved before the network was settled" in caplog.text


def test_other_optimizers_models_and_clipping_are_refused(tmp_path):
    model = Classifier()
    optimizer = held(model)
    with pytest.raises(TypeError, match=r"got NoneType; build one, and pass Trainer\(optimizers"):
        trainer(tmp_path, None, model=model)
    with pytest.raises(TypeError, match="got AdamW"):
        trainer(tmp_path, torch.optim.AdamW(model.parameters()), model=model)
    with pytest.raises(ValueError, match="not those of the model that the Trainer trains"):
        trainer(tmp_path, optimizer, model=Classifier())
    with pytest.raises(ValueError, match="Set max_grad_norm=0"):
        trainer(tmp_path, optimizer, max_grad_norm=1.0)
    late = Trainer(model, arguments(tmp_path), train_dataset=DATA, optimizers=(optimizer, None))
    late.add_callback(FIPCallback())
    late.args.max_grad_norm = 0.5
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="Set max_grad_norm=0"):
        late.train()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_a_callback_that_comes_too_late_to_resume_is_refused(tmp_path):
    optimizer = held(Classifier())
    trainer(tmp_path, optimizer, max_steps=2).train()
    late = Trainer(
        optimizer.anchors.model,
        arguments(tmp_path),
        train_dataset=DATA,
        optimizers=(held(optimizer.anchors.model), None),
    )
    late.add_callback(FIPCallback())
    with pytest.raises(ValueError, match="other reference outputs|too late to restore"):
        late.train(str(tmp_path / "checkpoint-2"))
