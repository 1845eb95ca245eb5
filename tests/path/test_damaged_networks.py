"""Files of networks that were changed after they were written: every way to read them refuses them."""

import copy
import dataclasses
import hashlib
import shutil
import tempfile
from pathlib import Path

import matplotlib
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from walks import TiedNet, assert_same, make, walk

from fipoptim.path.folder import PathFolder
from fipoptim.path.record import FIPPath

matplotlib.use("Agg")


READS = {
    "item": lambda path: path[1],
    "all": lambda path: list(path),
    "load_into": lambda path: path.load_into(TiedNet(), 1),
    "ensemble": lambda path: path.ensemble(TiedNet()),
    "forward": lambda path: path.ensemble(TiedNet(), [0, 1])(torch.randn(2, 5)),
    "pca": lambda path: path.pca(),
    "plot": lambda path: path.plot(),
}


def assert_refused(folder, file, error=ValueError, match=""):
    path = FIPPath.open(folder)
    for name, read in READS.items():
        if name != "ensemble" or "00000" in file:
            with pytest.raises(error, match=f"{match}.*{file}|{file}.*{match}"):
                read(path)


@given(st.data())
@settings(max_examples=40)
def test_a_file_with_a_flipped_bit_is_refused(undamaged, data):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(undamaged[0], Path(place) / "damaged"))
        file = folder / "network-00001.safetensors"
        content = bytearray(file.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
        assert_refused(folder, r"network-00001\.safetensors", match="SHA-256")
        assert_same(FIPPath.open(folder)[2], undamaged[1][2])


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(damaged, kept):
    file = damaged / "network-00001.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert_refused(damaged, r"network-00001\.safetensors")


def test_a_file_that_is_deleted_after_opening_is_an_error(damaged):
    path = FIPPath.open(damaged)
    (damaged / "network-00001.safetensors").unlink()
    for name in ("item", "load_into", "forward", "pca"):
        with pytest.raises(FileNotFoundError, match=r"network-00001\.safetensors"):
            READS[name](path)


def test_a_network_of_another_path_or_position_is_refused(damaged, tmp_path):
    model, optimizer = make(seed=7)
    with FIPPath(optimizer, folder=tmp_path / "other"):
        walk(model, optimizer, 1)
    for source in (tmp_path / "other" / "network-00001", damaged / "network-00002"):
        shutil.copy(f"{source}.safetensors", damaged / "network-00001.safetensors")
        assert_refused(damaged, r"network-00001\.safetensors", match="SHA-256")


def test_damage_after_the_first_read_is_found(damaged):
    path = FIPPath.open(damaged)
    state = path[1]
    before = copy.deepcopy(state)
    path.pca()
    members = path.ensemble(TiedNet())
    file = damaged / "network-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert_same(state, before)
    for read in (lambda: path[1], path.pca, lambda: members(torch.randn(2, 5))):
        with pytest.raises(ValueError, match="SHA-256"):
            read()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s | {"back.weight": torch.zeros(5, 7)}, r"back\.weight \(5, 7\)"),
        (lambda s: {k: s[k] for k in s if k != "scale"}, "scale missing"),
        (lambda s: {k: s[k] for k in s if k != "embed.weight"}, r"embed\.weight missing"),
    ],
)
def test_a_network_with_a_valid_checksum_that_does_not_fit_is_refused(damaged, change, match):
    files = PathFolder(damaged)
    index = files.read_index()
    state = change(files.read_network(1, index))
    sha256 = files.write_network(1, {name: tensor.clone() for name, tensor in state.items()})
    index.entries[1] = dataclasses.replace(index.entries[1], sha256=sha256)
    files.write_index(index)
    assert_refused(damaged, r"network-00001\.safetensors", match=match)


def test_a_file_with_a_valid_checksum_that_is_not_safetensors_is_refused(damaged):
    files = PathFolder(damaged)
    index = files.read_index()
    files.network_file(1).write_bytes(b"no network")
    sha256 = hashlib.sha256(b"no network").hexdigest()
    index.entries[1:] = [dataclasses.replace(index.entries[1], sha256=sha256)]
    files.write_index(index)
    assert_refused(damaged, r"network-00001\.safetensors", match="no safetensors file")
