"""The default settings: for texts with LoRA, for texts with all weights, and for images."""

from __future__ import annotations

from recipes.finetune.methods.distillation import DistillationOptions
from recipes.finetune.methods.l2sp import L2SPOptions
from recipes.finetune.methods.path import PathOptions
from recipes.finetune.methods.plain import PlainOptions
from recipes.finetune.settings import FinetuneSettings

LORA = FinetuneSettings()
WHOLE = FinetuneSettings(
    method_options=(
        PathOptions(eps=0.1),
        PlainOptions(plain_lr=(1e-4,)),
        DistillationOptions(distillation_lr=(1e-4,)),
        L2SPOptions(l2sp_lr=(1e-4,)),
    ),
)
IMAGES = FinetuneSettings(
    seconds=30.0,
    head=30,
    train=100,
    method_options=(
        PathOptions(max_drift=(20.0,), eps=0.1),
        PlainOptions(plain_lr=(1e-4,)),
        DistillationOptions(distillation_lr=(1e-4,), distillation_weight=(0.01,)),
        L2SPOptions(l2sp_lr=(1e-4,), l2sp_weight=(0.1,)),
    ),
)
