"""The head for new classes: how it is fitted before anything is fine-tuned, and what is trained then."""

from __future__ import annotations

import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from recipes.finetune.case import Examples, evaluated, loss
from recipes.finetune.outputs import features


def fit_head(model: nn.Module, examples: Examples, C: float) -> None:
    """Fits ``model.head`` to the features of the pretrained network, by logistic regression.

    A head that fits the start pulls less on the network than a random one (Kumar et al., 2022). It is fitted to other
    examples than those of the fine-tuning, on which it would be too sure of itself.

    Args:
        model: The network, in eval mode; its head is changed in place.
        examples: The examples, with at least one of each class.
        C: The inverse strength of the decay.
    """
    head = model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    x = evaluated(model, examples.inputs, features)
    fitted = LogisticRegression(C=C, max_iter=1000).fit(
        x.cpu().numpy(), examples.labels.cpu().numpy()
    )
    weight, bias = (torch.from_numpy(found).to(x) for found in (fitted.coef_, fitted.intercept_))
    if len(weight) == 1:  # two classes have one row of coefficients: that of the second class
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)


def new_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the head, which the pretrained network does not have."""
    return [p for name, p in model.named_parameters() if name.startswith("head.")]


def freeze_unused(model: nn.Module, examples: Examples) -> None:
    """Has parameters on which no output depends, such as those of a pooler, require no gradient."""
    loss(model, examples.at(torch.arange(2))).backward()
    for p in model.parameters():
        p.requires_grad_(p.grad is not None)
    model.zero_grad()
