"""Fixtures of the tests of a path."""

import shutil
from pathlib import Path

import pytest
from walks import Disk, make, walk

from fipoptim.path.record import FIPPath


@pytest.fixture(params=["memory", "folder"])
def folder(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "new" / "path"


@pytest.fixture
def recorded(folder):
    model, optimizer = make()
    with FIPPath(optimizer, folder=folder) as path:
        states = walk(model, optimizer, 6)
    return model, path, states


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    """A folder with a path, and its states; copied before it is damaged."""
    folder = tmp_path_factory.mktemp("undamaged")
    model, optimizer = make()
    with FIPPath(optimizer, folder=folder):
        states = walk(model, optimizer, 3)
    return folder, states


@pytest.fixture
def damaged(undamaged, tmp_path):
    return Path(shutil.copytree(undamaged[0], tmp_path / "damaged"))
