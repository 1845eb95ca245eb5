"""The settings of the solver."""

from __future__ import annotations

import math

import pytest

from fipoptim import Solver


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"products": -1}, "products"),
        ({"products": "many"}, "products"),
        ({"products": True}, "products"),
        ({"products": 2.5}, "products"),
        ({"max_products": 0}, "max_products"),
        ({"tol": -1.0}, "tol"),
        ({"tol": math.nan}, "tol"),
        ({"radius": 0.0}, "radius"),
        ({"radius": math.inf}, "radius"),
    ],
)
def test_bad_settings_are_named(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}:"):
        Solver(**options)  # type: ignore[arg-type]
