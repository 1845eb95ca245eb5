"""Libraries that only a part of fipoptim needs: each is imported when that part is used."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_for(purpose: str, module: str) -> ModuleType:
    """Import the optional ``module``.

    Args:
        purpose: The use of the module, to complete "... is needed to".
        module: Its name, with dots for a submodule.

    Raises:
        ImportError: If it is not installed. The message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{package} is needed to {purpose} and is not installed: pip install {package}."
        ) from error
