"""Recordings that a kill or an interrupt stops: the folder holds the networks up to then."""

import contextlib
import copy
import shutil

import pytest
from walks import WRITES, assert_holds, make, walk

from fipoptim.path.record import FIPPath


def test_every_state_of_the_folder_can_be_opened_or_recorded_into(tmp_path, disk):
    """The folder is copied before, during and after each change. A kill would leave one of these copies."""
    folder, moments = tmp_path / "path", []

    def snapshot(partial=None):
        if folder.is_dir():
            copied = tmp_path / f"moment-{len(moments)}"
            shutil.copytree(folder, copied)
            if partial is not None:
                (copied / partial).write_bytes(whole[: len(whole) // 2])
            moments.append(copied)

    whole = b""

    def after(call, file):
        nonlocal whole
        snapshot()
        if call in ("save_file", "write_text") and file.parent == folder:
            whole = file.read_bytes()
            snapshot(file.name)

    model, optimizer = make()
    path = FIPPath(optimizer, folder=folder)
    disk.before = lambda call, file: snapshot()
    disk.after = after
    with path:
        states = walk(model, optimizer, 3)
    disk.before = disk.after = lambda call, file: None
    assert len(moments) > 20
    lengths = []
    for moment in moments:
        try:
            found = len(FIPPath.open(moment))
        except FileNotFoundError:
            found = 0
            assert not (moment / "index.json").exists()
        lengths.append(found)
        if found:
            assert_holds(moment, states, list(range(found)))
            with pytest.raises(FileExistsError, match="already holds"):
                FIPPath(optimizer, folder=moment)
        else:
            again, stepper = make()
            with FIPPath(stepper, folder=moment):
                anew = walk(again, stepper, 1)
            assert_holds(moment, anew, [0, 1])
            assert not list(moment.glob("*.partial"))
    assert lengths == sorted(lengths)
    assert set(lengths) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("call", "file"), WRITES)
def test_recording_continues_after_an_interrupt_inside_the_with_block(
    tmp_path, disk, call, file, when
):
    model, optimizer = make()
    leaving = (
        contextlib.nullcontext()
        if file == "index.json"
        else pytest.raises(RuntimeError, match=r"steps \[2\] could not be recorded")
    )
    with leaving, FIPPath(optimizer, folder=tmp_path):
        states = walk(model, optimizer, 1)

        def interrupt(now, at):
            if now == call and at.name.startswith(file):
                raise KeyboardInterrupt

        setattr(disk, when, interrupt)
        with pytest.raises(KeyboardInterrupt):
            walk(model, optimizer, 1)
        setattr(disk, when, lambda call, file: None)
        states.append(copy.deepcopy(model.state_dict()))
        assert len(FIPPath.open(tmp_path)) in (2, 3)
        states += walk(model, optimizer, 1)[1:]
    steps = [0, 1, 2, 3] if file == "index.json" else [0, 1, 3]
    assert_holds(tmp_path, states, steps)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("call", "file"), WRITES)
def test_the_networks_before_an_interrupt_that_ends_the_recording_can_be_opened(
    tmp_path, disk, call, file, when
):
    model, optimizer = make()

    def interrupt(now, at):
        if now == call and at.name.startswith(file):
            setattr(disk, when, lambda call, file: None)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), FIPPath(optimizer, folder=tmp_path):
        states = walk(model, optimizer, 1)
        setattr(disk, when, interrupt)
        walk(model, optimizer, 1)
    states.append(copy.deepcopy(model.state_dict()))
    assert_holds(tmp_path, states, [0, 1, 2])
