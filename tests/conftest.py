"""Settings of all tests."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# There is no deadline, because the first example of a property pays for what torch sets up on first use.
# CI tries the same examples each time; elsewhere every run tries new ones.
settings.register_profile("fipoptim", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("fipoptim")

# Libraries that load models from a hub do not look for one.
os.environ["HF_HUB_OFFLINE"] = "1"

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file go to one worker, so that what they share is made once; those of a recipe's folder, too."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            parts = item.path.relative_to(HERE).parts
            shared = parts[0] == "recipes" and len(parts) > 2
            name = "/".join(parts[:-1] if shared else parts)
            item.add_marker(pytest.mark.xdist_group(name))


# Workers share the cores, and sums of one thread come out the same in every run.
torch.set_num_threads(1)
