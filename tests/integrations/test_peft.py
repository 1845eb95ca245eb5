"""FIPOptimizer on adapters of PEFT."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_texts import LABELS, OLD, TOKENS, Classifier, dataset, inputs
from torch import nn
from transformers import Trainer, TrainingArguments

from fipoptim import AnchorBatch, FIPOptimizer, Solver
from fipoptim.integrations.peft import trainable_parameters
from fipoptim.integrations.transformers import FIPCallback


def adapted(dtype=torch.float32):
    """Adapters on a layer, and a head that is trained whole."""
    config = LoraConfig(r=2, target_modules=["hidden"], modules_to_save=["head"])
    torch.manual_seed(0)
    return get_peft_model(Classifier(dropout=0.0).to(dtype), config)


def held(model, **options):
    params = trainable_parameters(model)
    anchors = AnchorBatch(model, inputs(OLD), check=0.4)
    return FIPOptimizer(params, anchors, beta=5.0, eps=0.3, **options)


def step(model, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(**inputs(TOKENS))["logits"], LABELS).backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_and_saved_modules_learn_within_a_budget_and_nothing_else_moves(dtype):
    model = adapted(dtype)
    optimizer = held(model, max_drift=0.05, check_every=None, solver=Solver(products=2))
    start = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(4):
        step(model, optimizer)
    assert optimizer.last_step.iterations == 2
    assert optimizer.settle().after.drift <= 0.05
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(moved) == 4  # two factors, a weight and a bias
    assert optimizer.anchors.check.drift() <= 0.05
    assert {start[name].dtype for name in start.keys() - moved} == {dtype}


def test_a_head_in_half_precision_becomes_one_in_full_precision():
    model, plain = adapted(torch.bfloat16), adapted()
    exact = plain(**inputs(OLD))["logits"]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {
        torch.bfloat16,
        torch.float32,
    }
    params = trainable_parameters(model)
    assert {p.dtype for p in params} == {torch.float32}
    assert [id(p) for p in params] == [id(p) for p in model.parameters() if p.requires_grad]
    z = model(**inputs(OLD))["logits"]
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, exact, rtol=0.05, atol=0.05)


def test_a_run_of_the_trainer_is_resumed_bit_for_bit(tmp_path):
    def trained(folder, seed, resume=None):
        model = adapted()
        params = trainable_parameters(model)
        generator = torch.Generator().manual_seed(seed)
        anchors = AnchorBatch(model, inputs(OLD), check=0.4, batch_size=6, generator=generator)
        optimizer = FIPOptimizer(params, anchors, beta=5.0, max_drift=0.01, check_every=None)
        arguments = TrainingArguments(
            str(folder),
            max_steps=4,
            save_steps=2,
            max_grad_norm=0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(
            model,
            arguments,
            train_dataset=dataset(),
            optimizers=(optimizer, None),
            callbacks=[FIPCallback()],
        ).train(resume)
        return params, anchors

    whole, anchors = trained(tmp_path, 1)
    resumed, others = trained(tmp_path / "b", 7, str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed, strict=True))
    assert others.drift() == anchors.drift() > 0


def test_merged_adapters_are_not_trained():
    model = adapted()
    optimizer = held(model, max_drift=0.01, check_every=None)
    step(model, optimizer)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    assert optimizer.anchors.drift() > 0  # what is evaluated may be merged
    with pytest.raises(RuntimeError, match=r"1 layers are merged .*unmerge_adapter"):
        step(model, optimizer)
    with pytest.raises(ValueError, match="adapters are merged"):
        trainable_parameters(model)
    model.unmerge_adapter()
    torch.testing.assert_close(dict(model.named_parameters()), before)
    step(model, optimizer)
    network = model.merge_and_unload()
    weights = [p.clone() for p in network.parameters()]
    with pytest.raises(ValueError, match="does not belong to the anchors' model"):
        optimizer.settle()
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), weights, strict=True))


def test_bad_models_are_refused(tmp_path):
    with pytest.raises(TypeError, match="must be a PeftModel, got Linear"):
        trainable_parameters(nn.Linear(1, 1))
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nothing is trainable"):
        trainable_parameters(PeftModel.from_pretrained(Classifier(), tmp_path))
