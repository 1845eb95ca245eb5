"""The settings of the attacks on ensembles, and the names of the sizes of attacks."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.common.options import COUNT, number, whole
from recipes.common.settings import option


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """The settings of attacks. Sizes are largest changes of a pixel, as a share of the pixels' range.

    Images are the first of the test set.
    """

    attack_eps: tuple[float, ...] = option(
        "largest changes of a pixel", type=number, nargs="+", metavar="X"
    )
    table_eps: float = option(
        "the same for attacks on the ensembles themselves", type=number, metavar="X"
    )
    attack_images: int = option("test images attacked on the start network", default=1000, **COUNT)
    white_box_images: int = option("test images attacked on each ensemble", default=500, **COUNT)
    auto_attack_images: int = option(
        "test images for AutoAttack; 0 leaves it out", default=100, type=whole(0), metavar="N"
    )
    attack_steps: int = option("steps of an attack", default=20, **COUNT)
    attack_restarts: int = option("random starts of an attack", default=1, **COUNT)


def size_name(eps: float) -> str:
    """The name of an attack's size in results and files."""
    return f"{eps:.6g}"
