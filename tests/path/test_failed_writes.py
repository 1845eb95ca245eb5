"""Networks that could not be written: the run continues, and an error says at the end which ones are missing."""

import contextlib
import errno
import gc
import shutil
import weakref

import pytest
import torch
from torch import nn
from walks import WRITES, Follower, TiedNet, assert_holds, assert_same, euclidean, make, walk

from fipoptim.path.record import FIPPath


@pytest.mark.parametrize(("call", "file"), WRITES)
def test_an_optimizer_step_counts_although_its_network_could_not_be_written(
    tmp_path, disk, call, file
):
    model, optimizer = make()
    plain, plainly = make()
    expected = walk(plain, plainly, 4)
    torch.manual_seed(0)
    TiedNet()  # draws what make() draws
    full = pytest.raises(OSError, match=r"path: .*No space left on device.*")
    with full as raised, FIPPath(optimizer, folder=tmp_path) as path:
        states = walk(model, optimizer, 2)
        disk.fail(call, file)
        # The path gives a warning, which is an error in these tests. It must not come out of the step.
        states += walk(model, optimizer, 2)[1:]
    for state, twin in zip(states, expected, strict=True):
        assert_same(state, twin)
    assert raised.value.errno == errno.ENOSPC
    assert len(list(tmp_path.glob("*.partial"))) == 0
    if file == "index.json":
        assert path.steps == [0, 1, 2, 3, 4]  # this process has all networks
        assert_same(path[4], states[4])
        assert "the last 2 networks could not be listed" in str(raised.value)
    else:
        assert path.steps == [0, 1, 2]
        assert path.missed == [3, 4]
        assert "steps [3, 4] could not be recorded" in str(raised.value)
        assert repr(path).endswith("; steps [3, 4] could not be recorded)")
    assert_holds(tmp_path, states, [0, 1, 2])


@pytest.mark.parametrize(("call", "file"), WRITES)
def test_a_warning_names_the_file_and_the_cause_once(tmp_path, disk, call, file):
    model, optimizer = make()
    with pytest.raises(OSError), FIPPath(optimizer, folder=tmp_path):
        disk.fail(call, file)
        name = "index.json" if file == "index.json" else "network-00001.safetensors"
        with pytest.warns(RuntimeWarning, match=f"step 1 .*No space left.*{name}") as given:
            walk(model, optimizer, 3)
        assert len(given) == 1


@pytest.mark.parametrize(("call", "file"), WRITES)
def test_later_networks_are_tried_again(tmp_path, disk, call, file):
    model, optimizer = make()
    leaving = (
        contextlib.nullcontext()
        if file == "index.json"
        else pytest.raises(OSError, match=r"steps \[2\] could not be recorded")
    )
    with leaving, FIPPath(optimizer, folder=tmp_path) as path:
        states = walk(model, optimizer, 1)
        disk.fail(call, file)
        states += walk(model, optimizer, 1)[1:]
        disk.repair()
        states += walk(model, optimizer, 2)[1:]
    steps = [0, 1, 2, 3, 4] if file == "index.json" else [0, 1, 3, 4]
    again = assert_holds(tmp_path, states, steps)
    assert path.missed == sorted({0, 1, 2, 3, 4} - set(steps))
    assert again.length() == pytest.approx(
        sum(euclidean(states[a], states[b], model) for a, b in zip(steps, steps[1:], strict=False)),
        rel=1e-6,
    )


@pytest.mark.parametrize(("call", "file"), WRITES)
def test_the_last_network_is_tried_again_on_leaving(tmp_path, disk, call, file):
    model, optimizer = make()
    with FIPPath(optimizer, folder=tmp_path) as path:
        disk.fail(call, file)
        states = walk(model, optimizer, 1)
        disk.repair()
    assert path.missed == []
    assert_holds(tmp_path, states, [0, 1])


@pytest.mark.parametrize(("call", "file"), WRITES)
def test_recording_fails_if_the_start_network_cannot_be_written(tmp_path, disk, call, file):
    model, optimizer = make()
    path = FIPPath(optimizer, folder=tmp_path)
    disk.fail(call, file)
    with pytest.raises(OSError, match="No space left"), path:
        raise AssertionError("entered")
    assert len(path) == 0
    disk.repair()
    with path:
        states = walk(model, optimizer, 1)
    assert_holds(tmp_path, states, [0, 1])


def test_an_error_in_the_with_block_is_raised_with_a_note_about_missed_networks(tmp_path, disk):
    model, optimizer = make()
    with pytest.raises(KeyError, match="theirs") as raised, FIPPath(optimizer, folder=tmp_path):
        disk.fail("save_file", "network-")
        walk(model, optimizer, 1)
        raise KeyError("theirs")
    (note,) = raised.value.__notes__
    assert "steps [1] could not be recorded" in note
    walk(model, optimizer, 1)  # this step is not recorded


def test_an_error_of_safetensors_is_raised_as_an_os_error(tmp_path, disk):
    from safetensors import SafetensorError

    model, optimizer = make()
    with (
        pytest.raises(OSError, match=r"network-00001\.safetensors: os error 28"),
        FIPPath(optimizer, folder=tmp_path),
    ):
        disk.fail("save_file", "network-", SafetensorError("os error 28"))
        walk(model, optimizer, 1)


def test_a_network_larger_than_the_systems_file_limit_is_missed(tmp_path):
    import resource

    net = nn.Linear(5, 5000)
    optimizer = Follower(net)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        pytest.raises(OSError, match=r"steps \[1\] could not be recorded.*File too large"),
        FIPPath(optimizer, folder=tmp_path),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            states = walk(net, optimizer, 1)
            assert not torch.equal(states[0]["weight"], states[1]["weight"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        states += walk(net, optimizer, 1)[1:]
    assert_holds(tmp_path, states, [0, 2])


@pytest.mark.parametrize("made_again", [False, True])
def test_networks_are_missed_after_the_folder_was_removed(tmp_path, made_again):
    model, optimizer = make()
    folder = tmp_path / "path"
    with (
        pytest.raises(OSError, match="was removed while the path was recorded"),
        FIPPath(optimizer, every=2, folder=folder) as path,
    ):
        walk(model, optimizer, 1)
        shutil.rmtree(folder)
        if made_again:
            folder.mkdir()
        walk(model, optimizer, 2)
    assert path.missed == [2, 3]
    assert not folder.exists() or not list(folder.iterdir())
    with pytest.raises(FileNotFoundError, match=r"network-00000\.safetensors"):
        path[0]


def test_the_working_directory_may_change(tmp_path, monkeypatch):
    model, optimizer = make()
    monkeypatch.chdir(tmp_path)
    with FIPPath(optimizer, folder="path") as path:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        states = walk(model, optimizer, 1)
    assert_same(path[1], states[1])
    assert_holds(tmp_path / "path", states, [0, 1])


def test_a_network_that_could_not_be_written_is_not_held(tmp_path, disk, monkeypatch):
    import safetensors.torch

    held = []

    def full(state, file):
        held.append(weakref.ref(state["scale"]))
        raise OSError(errno.ENOSPC, "full")

    model, optimizer = make()
    with pytest.raises(OSError), FIPPath(optimizer, folder=tmp_path):
        monkeypatch.setattr(safetensors.torch, "save_file", full)
        walk(model, optimizer, 2)
        gc.collect()
        assert [ref() for ref in held] == [None, None]
