"""The folder of a path: it can be opened again, and is not overwritten by another recording."""

import importlib
import json

import pytest
import torch
from walks import assert_holds, assert_same, make, walk

from fipoptim.path.record import FIPPath


def record_path(folder, steps=3):
    model, optimizer = make()
    with FIPPath(optimizer, folder=folder) as path:
        states = walk(model, optimizer, steps)
    return model, path, states


def test_open_gives_the_same_path(tmp_path):
    model, path, states = record_path(tmp_path)
    again = FIPPath.open(str(tmp_path))
    assert again.metadata == path.metadata
    assert again.every == 1
    assert len(again) == 4
    for state, expected in zip(again, states, strict=True):
        assert_same(state, expected)
    torch.testing.assert_close(again.pca(), path.pca(), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"opt\.record"), again:
        pass


def test_a_folder_with_a_path_is_refused_before_anything_is_written(tmp_path):
    record_path(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"folder: .* Choose another.*FIPPath\.open"):
        FIPPath(make()[1], folder=tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_second_of_two_recordings_prepared_for_one_folder_is_refused(tmp_path):
    first, second = (FIPPath(make()[1], folder=tmp_path) for _ in range(2))
    with first:
        pass
    with pytest.raises(FileExistsError), second:
        pass


def test_other_files_in_the_folder_are_no_obstacle(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    record_path(tmp_path)
    assert len(FIPPath.open(tmp_path)) == 4


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        FIPPath(make()[1], folder=tmp_path / "file")


def test_an_interrupted_write_leaves_a_readable_path(tmp_path, monkeypatch):
    import safetensors.torch

    model, optimizer = make()
    with FIPPath(optimizer, folder=tmp_path):
        states = walk(model, optimizer, 2)
        save_file = safetensors.torch.save_file

        def interrupted(state, file):
            save_file(state, file)
            file.write_bytes(file.read_bytes()[:10])
            raise KeyboardInterrupt

        monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            walk(model, optimizer, 1)
        monkeypatch.undo()
        path = FIPPath.open(tmp_path)
        assert len(path) == 3
        assert_same(path[-1], states[-1])
        assert len(list(tmp_path.iterdir())) == 4


def test_open_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no recorded path"):
        FIPPath.open(tmp_path)
    record_path(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "network-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"network-00001\.safetensors is listed"):
        FIPPath.open(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(index | {"version": 99}))
    with pytest.raises(ValueError, match="'version': 99"):
        FIPPath.open(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "fip')
    with pytest.raises(ValueError, match="not the index of a recorded path"):
        FIPPath.open(tmp_path)


def test_safetensors_is_needed_only_for_a_folder(tmp_path, monkeypatch):
    real = importlib.import_module

    def missing(name, *rest):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"safetensors is needed.*pip install safetensors"):
        FIPPath(make()[1], folder=tmp_path / "path")
    assert not (tmp_path / "path").exists()
    with pytest.raises(ImportError, match="safetensors"):
        FIPPath.open(tmp_path)
    with FIPPath(make()[1]) as path:
        pass
    assert len(path) == 1


@pytest.mark.parametrize("folder", [3, b"folder", True, ["folder"], 1.5])
def test_a_folder_must_be_a_path(folder):
    for take in (FIPPath.open, lambda folder: FIPPath(make()[1], folder=folder)):
        with pytest.raises(TypeError, match="folder: must be a path"):
            take(folder)


def test_a_folder_with_a_first_network_and_no_index_is_recorded_into_again(tmp_path):
    model, optimizer = make()
    with FIPPath(optimizer, folder=tmp_path):
        pass
    (tmp_path / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no recorded path"):
        FIPPath.open(tmp_path)
    with FIPPath(optimizer, folder=tmp_path):
        states = walk(model, optimizer, 1)
    assert_holds(tmp_path, states, [0, 1])


def test_networks_whose_index_is_lost_are_not_overwritten(tmp_path):
    model, optimizer = make()
    with FIPPath(optimizer, folder=tmp_path):
        walk(model, optimizer, 1)
    for lose in ((tmp_path / "index.json").unlink, lambda: None):
        lose()
        with pytest.raises(FileExistsError, match=r"holds networks and no index\.json"):
            FIPPath(optimizer, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_index_is_not_overwritten(tmp_path):
    model, optimizer = make()
    with FIPPath(optimizer, folder=tmp_path):
        pass
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(FileExistsError, match="already holds a recorded path"):
        FIPPath(optimizer, folder=tmp_path)
    assert (tmp_path / "index.json").read_text() == "{"
