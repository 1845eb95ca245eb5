"""Steps along the gradient that a K-FAC of the anchors preconditions, in the manner of CrispEdit (arXiv 2602.15823)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recipes.common.data import DataError
from recipes.common.options import RATE
from recipes.common.progress import Progress
from recipes.common.settings import option
from recipes.hotfix.case import Case
from recipes.hotfix.methods.method import Method, edit_loss, take_steps
from recipes.hotfix.settings import HotfixSettings


@dataclass(frozen=True)
class KFACOptions:
    """The settings of the K-FAC method that are tried, each length with each damping."""

    group: ClassVar[str] = "K-FAC"
    kfac_eps: tuple[float, ...] = option(
        "lengths of a step to try", default=(0.1, 0.03), nargs="+", **RATE
    )
    kfac_damping: tuple[float, ...] = option(
        "dampings to try, as shares of the mean of K's diagonal",
        default=(1.0, 0.1, 0.01),
        nargs="+",
        **RATE,
    )


class KFAC(Method):
    r"""Steps of a given length along :math:`-(K + \mu I)^{-1} b`.

    :math:`K` is the Kronecker-factored metric of the anchors' logits at the old network. Weights of convolutional and
    linear layers move, others stay.
    """

    title = "K-FAC of the anchors"
    option_kinds = (KFACOptions,)

    def choices(self, settings: HotfixSettings) -> Sequence[Mapping[str, float]]:
        """Each length with each damping."""
        own = settings.of(KFACOptions)
        return [{"eps": e, "damping": d} for e in own.kfac_eps for d in own.kfac_damping]

    def fix(
        self,
        model: nn.Module,
        case: Case,
        settings: HotfixSettings,
        choice: Mapping[str, float],
        *,
        seed: int,
        progress: Progress,
    ) -> tuple[int, dict[str, Any]]:
        """See :class:`Method`.

        Raises:
            DataError: If curvlinops is not installed.
        """
        params: list[Tensor] = [
            p
            for layer in model.modules()
            if isinstance(layer, nn.Conv2d | nn.Linear)
            for p in layer.parameters()
        ]
        inverse = _inverse(model, params, case, choice["damping"])

        def step() -> None:
            gradients = torch.autograd.grad(edit_loss(model, case), params)
            direction = inverse([g.detach() for g in gradients])
            length = torch.stack([d.norm() for d in direction]).norm()
            with torch.no_grad():
                for p, d in zip(params, direction, strict=True):
                    p.sub_(d, alpha=choice["eps"] / float(length))

        return take_steps(model, case, step, most=settings.max_steps, progress=progress), {}


def _inverse(
    model: nn.Module, params: list[Tensor], case: Case, damping: float
) -> Callable[[list[Tensor]], list[Tensor]]:
    """The product with the inverse of the damped K-FAC."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # curvlinops' dependencies, of themselves
        try:
            from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
        except ImportError:
            raise DataError(
                "argument --method: kfac needs curvlinops, which is not installed: pip install 'fipoptim[bench]'"
            ) from None
        with torch.no_grad():
            targets = model(case.anchors)
        metric = KFACLinearOperator(
            model,
            nn.MSELoss(reduction="mean"),
            params,
            [(case.anchors, targets)],
            check_deterministic=False,
            fisher_type="type-2",
        )
        mean = float(metric.trace) / sum(p.numel() for p in params)
        inverse = KFACInverseLinearOperator(metric, damping=damping * mean, use_exact_damping=True)

        def product(gradients: list[Tensor]) -> list[Tensor]:
            found: list[Tensor] = inverse @ gradients
            return found

        product([torch.zeros_like(p) for p in params])  # factors are made once, here
        return product
