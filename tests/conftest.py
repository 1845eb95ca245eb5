"""Settings of all tests."""

import os

import torch
from hypothesis import settings

# There is no deadline, because the first example of a property pays for what torch sets up on first use.
# CI tries the same examples each time; elsewhere every run tries new ones.
settings.register_profile("fipoptim", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("fipoptim")

# Libraries that load models from a hub do not look for one.
os.environ["HF_HUB_OFFLINE"] = "1"

# Workers share the cores, and sums of one thread come out the same in every run.
torch.set_num_threads(1)
