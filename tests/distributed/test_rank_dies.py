"""A rank is killed in the middle of a step."""

import os
from unittest import mock

import pytest
import torch
from dies import LAST, OPTIONS, SAVED
from launch import ended
from modes import Run
from rank import Rank

KILLED = -9


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    return ended("dies.py", tmp_path_factory.mktemp("dies"), 3, limit=400)


def test_the_others_end_with_an_error(ends):
    """None waits for longer than the process group's timeout, and none takes a further step by itself."""
    first, killed, last = ends
    assert killed.code == KILLED
    for end in (first, last):
        assert end.code not in (0, KILLED), end.printed
        assert "Error" in end.printed


def test_the_checkpoint_of_before_resumes(ends):
    """On another number of ranks: this process alone."""
    with mock.patch.dict(os.environ, {"RANK": "0", "WORLD_SIZE": "1"}):
        whole, resumed = Run(Rank(), **OPTIONS), Run(Rank(), **OPTIONS)
    for k in range(LAST):
        whole.step(k)
    saved = ends[0].saved
    resumed.model.load_state_dict(saved["model"])
    resumed.anchors.load_state_dict(saved["anchors"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    for k in range(SAVED, LAST):
        resumed.step(k)
    assert resumed.anchors.drift() > 0
    for p, q in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-8)
