"""Settings of all tests."""

import torch
from hypothesis import settings

# The first example of a property pays for what torch sets up on first use.
settings.register_profile("fipoptim", deadline=None)
settings.load_profile("fipoptim")

# Workers share the cores, and sums of one thread come out the same in every run.
torch.set_num_threads(1)
