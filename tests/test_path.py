"""FIPPath: what is recorded, on disk and in memory, and what can be done with it afterwards."""

import builtins
import contextlib
import copy
import dataclasses
import errno
import gc
import hashlib
import importlib
import json
import math
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fipoptim import AnchorBatch, FIPOptimizer
from fipoptim.path.record import FIPPath
from fipoptim.path.store import PathFolder

matplotlib.use("Agg")


class TiedNet(nn.Module):
    """Tied weights, buffers (one of them not persistent), a scalar parameter, and a frozen one."""

    def __init__(self, width=6):
        super().__init__()
        self.embed = nn.Linear(5, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)
        self.back = nn.Linear(width, 5, bias=False)
        self.back.weight = nn.Parameter(self.embed.weight.detach().T.contiguous())
        self.again = nn.Linear(5, width, bias=False)
        self.again.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("mask", torch.ones(width), persistent=False)

    def forward(self, x):
        h = self.drop(self.norm(self.embed(x))) * self.mask
        return self.scale * self.back(h + self.again(x))


class Follower(torch.optim.SGD):
    """Stands in for FIPOptimizer: what a path asks of one, on plain gradient descent."""

    def __init__(self, model, lr=0.1):
        super().__init__([p for p in model.parameters() if p.requires_grad], lr=lr)
        self.anchors = SimpleNamespace(model=model, drift=lambda: 0.0)
        self.last_step = SimpleNamespace(drift=0.0)
        # As a hook: torch runs the hooks of a step that calls its parent's step twice.
        self.register_step_post_hook(self.report)

    def report(self, *_):
        self.last_step = SimpleNamespace(drift=self.last_step.drift + 0.5)


def make(seed=0, net=TiedNet):
    torch.manual_seed(seed)
    model = net()
    return model, Follower(model)


def walk(model, optimizer, steps):
    """Train, and return the state after every step, beginning with the one before the first."""
    states = [copy.deepcopy(model.state_dict())]
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()
        states.append(copy.deepcopy(model.state_dict()))
    return states


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def euclidean(a, b, model):
    names = [name for name, _ in model.named_parameters()]
    return math.sqrt(sum(float((a[n] - b[n]).double().square().sum()) for n in names))


@pytest.fixture(params=["memory", "folder"])
def folder(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "new" / "path"


class TestRecording:
    @pytest.mark.parametrize(
        ("every", "steps"),
        [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (5, [0, 5]), (9, [0, 5])],
    )
    def test_start_every_kth_and_last(self, folder, every, steps):
        model, optimizer = make()
        with FIPPath(optimizer, every=every, folder=folder) as path:
            states = walk(model, optimizer, 5)
        assert path.steps == steps
        assert len(path) == len(steps)
        for state, step in zip(path, steps, strict=True):
            assert_same(state, states[step])
        assert path.drifts == [0.5 * step for step in steps]
        expected = [
            euclidean(states[a], states[b], model) for a, b in zip(steps, steps[1:], strict=False)
        ]
        assert path.length() == pytest.approx(sum(expected), rel=1e-6)
        assert [point.length for point in path.metadata] == pytest.approx(
            [sum(expected[:i]) for i in range(len(steps))], rel=1e-6
        )

    def test_nothing_is_recorded_after_it_is_left(self, folder):
        model, optimizer = make()
        with FIPPath(optimizer, folder=folder) as path:
            walk(model, optimizer, 2)
        walk(model, optimizer, 2)
        assert len(path) == 3
        with pytest.raises(RuntimeError, match="recorded already"), path:
            pass

    def test_no_step_at_all(self, folder):
        model, optimizer = make()
        with FIPPath(optimizer, folder=folder) as path:
            pass
        assert path.steps == [0]
        assert path.length() == 0.0
        assert_same(path[0], model.state_dict())

    def test_an_error_inside_passes_through_and_the_network_is_kept(self, folder):
        model, optimizer = make()
        path = FIPPath(optimizer, every=10, folder=folder)
        with pytest.raises(KeyError, match="theirs"), path:
            states = walk(model, optimizer, 3)
            raise KeyError("theirs")
        assert path.steps == [0, 3]
        assert_same(path[-1], states[-1])
        walk(model, optimizer, 1)
        assert len(path) == 2

    def test_can_be_read_while_it_is_recorded(self, folder):
        model, optimizer = make()
        with FIPPath(optimizer, folder=folder) as path:
            states = walk(model, optimizer, 2)
            assert_same(path[-1], states[-1])
            if folder is not None:
                assert_same(FIPPath.open(folder)[1], states[1])

    def test_weights_are_kept_once_and_only_on_disk(self, tmp_path):
        model, optimizer = make()
        with FIPPath(optimizer, folder=tmp_path) as path:
            walk(model, optimizer, 3)
            assert not path._states
        assert not path._last
        files = sorted(file.name for file in tmp_path.iterdir())
        assert files == ["index.json", *(f"network-{i:05d}.safetensors" for i in range(4))]
        from safetensors.torch import load_file

        stored = load_file(tmp_path / "network-00002.safetensors")
        assert stored.keys() == model.state_dict().keys() - {"again.weight"}

    def test_memory_format_does_not_matter(self, folder):
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        with FIPPath(Follower(model), folder=folder) as path:
            pass
        assert_same(path[0], model.state_dict())
        path.load_into(model, 0)
        assert model.weight.is_contiguous(memory_format=torch.channels_last)

    def test_a_run_of_the_optimizer(self, folder):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        anchors = AnchorBatch(model, torch.randn(4, 5, dtype=torch.float64))
        x, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])

        def loss():
            return nn.functional.cross_entropy(model(x), y)

        optimizer = FIPOptimizer(model.parameters(), anchors, loss, eps=0.1, max_drift=0.01)
        with optimizer.record(every=1, folder=folder) as path:
            drifts, norms = [0.0], []
            for _ in range(4):
                optimizer.step()
                drifts.append(optimizer.last_step.drift)
                norms.append(optimizer.last_step.step_norm)
        assert path.drifts == drifts
        assert max(drifts) <= 0.01
        twin = copy.deepcopy(model)
        for i, drift in enumerate(drifts):
            path.load_into(twin, i)
            assert float((twin(anchors.inputs) - anchors.reference).square().sum(1).mean()) == (
                pytest.approx(drift, rel=1e-9, abs=1e-20)
            )
        assert path.length() == pytest.approx(sum(norms))

    @pytest.mark.parametrize("every", [0, -1, 2.0, True, "2"])
    def test_every_must_be_a_count(self, every):
        with pytest.raises(ValueError, match="every: must be a whole number"):
            FIPPath(make()[1], every=every)


class TestFolder:
    def record(self, folder, steps=3):
        model, optimizer = make()
        with FIPPath(optimizer, folder=folder) as path:
            states = walk(model, optimizer, steps)
        return model, path, states

    def test_open_gives_the_same_path(self, tmp_path):
        model, path, states = self.record(tmp_path)
        again = FIPPath.open(str(tmp_path))
        assert again.metadata == path.metadata
        assert again.every == 1
        assert len(again) == 4
        for state, expected in zip(again, states, strict=True):
            assert_same(state, expected)
        torch.testing.assert_close(again.pca(), path.pca(), rtol=0, atol=0)
        with pytest.raises(RuntimeError, match=r"opt\.record"), again:
            pass

    def test_a_folder_with_a_path_is_refused_before_anything_is_written(self, tmp_path):
        self.record(tmp_path)
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        with pytest.raises(FileExistsError, match=r"folder: .* Choose another.*FIPPath\.open"):
            FIPPath(make()[1], folder=tmp_path)
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before

    def test_two_recordings_prepared_for_one_folder(self, tmp_path):
        first, second = (FIPPath(make()[1], folder=tmp_path) for _ in range(2))
        with first:
            pass
        with pytest.raises(FileExistsError), second:
            pass

    def test_other_files_in_the_folder_are_no_obstacle(self, tmp_path):
        (tmp_path / "results.json").write_text("{}")
        self.record(tmp_path)
        assert len(FIPPath.open(tmp_path)) == 4

    def test_a_file_is_not_a_folder(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(FileExistsError, match="is a file"):
            FIPPath(make()[1], folder=tmp_path / "file")

    def test_an_interrupted_write_leaves_a_readable_path(self, tmp_path, monkeypatch):
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

    def test_open_names_what_is_wrong(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no recorded path"):
            FIPPath.open(tmp_path)
        self.record(tmp_path)
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

    def test_without_safetensors(self, tmp_path, monkeypatch):
        real = importlib.import_module

        def missing(name, *rest):
            if name.startswith("safetensors"):
                raise ImportError(name)
            return real(name, *rest)

        monkeypatch.setattr(importlib, "import_module", missing)
        with pytest.raises(ImportError, match=r'safetensors is needed.*"fipoptim\[recipes\]"'):
            FIPPath(make()[1], folder=tmp_path / "path")
        assert not (tmp_path / "path").exists()
        with pytest.raises(ImportError, match="safetensors"):
            FIPPath.open(tmp_path)
        with FIPPath(make()[1]) as path:
            pass
        assert len(path) == 1


@pytest.fixture
def recorded(folder):
    model, optimizer = make()
    with FIPPath(optimizer, folder=folder) as path:
        states = walk(model, optimizer, 6)
    return model, path, states


class TestReading:
    def test_indexing(self, recorded):
        _, path, states = recorded
        assert_same(path[-2], states[-2])
        for i in (7, -8):
            with pytest.raises(IndexError, match="7 networks"):
                path[i]
        with pytest.raises(TypeError, match="one whole number"):
            path[1:3]

    def test_a_state_is_the_callers_own(self, recorded):
        _, path, states = recorded
        path[2]["scale"].zero_()
        assert_same(path[2], states[2])

    def test_load_state_dict_takes_a_state(self, recorded):
        _, path, states = recorded
        model = TiedNet()
        model.load_state_dict(path[3], strict=True)
        assert_same(model.state_dict(), states[3])

    def test_load_into(self, recorded):
        _, path, states = recorded
        model = TiedNet().double()
        weight = model.embed.weight
        path.load_into(model, -3)
        assert model.embed.weight is weight is model.again.weight
        assert model.scale.dtype == torch.float64
        assert_same(model.float().state_dict(), states[-3])

    def test_load_into_changes_nothing_where_it_does_not_fit(self, recorded):
        _, path, _ = recorded
        model = TiedNet(width=7)
        model.more = nn.Linear(2, 2)
        del model.scale
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError) as error:
            path.load_into(model, 0)
        for part in (
            "more.weight is not in the path",
            "scale is not in the model",
            "embed.weight is (7, 5) in the model and (6, 5) in the path",
        ):
            assert part in str(error.value)
        assert_same(model.state_dict(), before)

    def test_untied_networks_do_not_fit_a_tied_model(self):
        model, optimizer = make()
        model.again.weight = nn.Parameter(torch.zeros(6, 5))
        with FIPPath(optimizer) as path:
            pass
        with pytest.raises(ValueError, match=r"embed\.weight and again\.weight are one tensor"):
            path.load_into(TiedNet(), 0)

    def test_repr(self, recorded):
        _, path, _ = recorded
        assert repr(path).startswith("FIPPath(7 networks in ")


class TestEnsemble:
    def expected(self, states, indices, x):
        total = torch.zeros(len(x), 5)
        for i in indices:
            model = TiedNet().eval()
            model.load_state_dict(states[i])
            total += model(x).softmax(-1)
        return total

    @pytest.mark.parametrize("indices", [None, [0, -1], [3], [2, 2, 5]])
    def test_is_the_summed_softmax(self, recorded, indices):
        model, path, states = recorded
        x = torch.randn(4, 5)
        members = path.ensemble(model, indices)
        chosen = range(7) if indices is None else indices
        assert len(members) == len(chosen)
        torch.testing.assert_close(members(x), self.expected(states, chosen, x))

    def test_the_model_is_left_alone(self, recorded):
        model, path, _ = recorded
        model.train()
        model.norm.eval()
        before = copy.deepcopy(model.state_dict())
        modes = [m.training for m in model.modules()]
        members = path.ensemble(model)
        x = torch.randn(4, 5)
        out = members(x)
        assert torch.equal(members.train()(x), out)  # members stay in eval mode
        assert members.training
        assert torch.equal(members.eval()(x), out)
        assert [m.training for m in model.modules()] == modes
        assert_same(model.state_dict(), before)
        assert all(p.requires_grad for n, p in model.named_parameters() if n != "frozen")

    def test_gradients_reach_the_inputs(self, recorded):
        model, path, states = recorded
        x = torch.randn(4, 5, requires_grad=True)
        path.ensemble(model)(x)[:, 0].sum().backward()
        ours, x.grad = x.grad, None
        self.expected(states, range(7), x)[:, 0].sum().backward()
        torch.testing.assert_close(ours, x.grad)

    def test_moves_and_keeps_precision(self, recorded):
        model, path, states = recorded
        x = torch.randn(4, 5)
        members = path.ensemble(model)
        expected = self.expected(states, range(7), x)
        out = members.double()(x.double())
        assert out.dtype == torch.float64
        torch.testing.assert_close(out.float(), expected)
        half = members.bfloat16()(x.bfloat16())
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, expected, atol=0.05, rtol=0.05)

    def test_logits_in_a_dict_and_another_class_dimension(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(1, 3, 1)

            def forward(self, *, pixels):
                return {"logits": self.conv(pixels), "other": None}

        model = Model()
        with FIPPath(Follower(model)) as path:
            pass
        x = torch.randn(2, 1, 4, 4)
        out = path.ensemble(model, dim=1)(pixels=x)
        torch.testing.assert_close(out, model.conv(x).softmax(1))

    def test_bad_members(self, recorded):
        model, path, _ = recorded
        with pytest.raises(ValueError, match="indices: is empty"):
            path.ensemble(model, [])
        with pytest.raises(IndexError, match="7 networks"):
            path.ensemble(model, [7])
        with pytest.raises(ValueError, match="model: is not of the architecture"):
            path.ensemble(TiedNet(width=7))


class TestPlane:
    def dense(self, states, model):
        names = [name for name, _ in model.named_parameters()]
        rows = torch.stack([torch.cat([s[n].flatten().double() for n in names]) for s in states])
        return rows - rows.mean(0)

    @pytest.mark.parametrize("budget", [8 * 7, 8 * 7 * 11, 2**28])
    def test_pca_is_that_of_the_dense_weights(self, recorded, monkeypatch, budget):
        model, path, states = recorded
        monkeypatch.setattr("fipoptim.path.record._PCA_BYTES", budget)
        u, s, _ = torch.linalg.svd(self.dense(states, model), full_matrices=False)
        coordinates, shares = path.pca(3)
        expected = u[:, :3] * s[:3]
        signs = torch.where((coordinates * expected).sum(0) < 0, -1.0, 1.0)
        torch.testing.assert_close(coordinates, expected * signs, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(shares, s.square()[:3] / s.square().sum())
        assert bool((coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True)) > 0).all())

    def test_blocks_stay_within_their_width(self, recorded):
        model, path, states = recorded
        blocks = list(path._blocks(13))
        assert max(block.shape[1] for block in blocks) <= 13
        joined = torch.cat(blocks, dim=1)
        torch.testing.assert_close(joined - joined.mean(0), self.dense(states, model))

    def test_more_components_than_networks(self):
        _, optimizer = make()
        with FIPPath(optimizer) as path:
            pass
        coordinates, shares = path.pca(2)
        assert coordinates.tolist() == [[0.0, 0.0]]
        assert shares.tolist() == [0.0, 0.0]

    def test_plot(self, recorded):
        import matplotlib.pyplot as plt

        _, path, _ = recorded
        ax = path.plot()
        line = ax.lines[0].get_xydata()
        torch.testing.assert_close(torch.as_tensor(line), path.pca(2)[0])
        assert ax.collections[0].get_array().tolist() == list(range(7))
        assert "component 1" in ax.get_xlabel()
        figure, mine = plt.subplots()
        assert path.plot(mine, color=path.drifts, label="drift") is mine
        assert mine.collections[0].get_array().tolist() == path.drifts
        with pytest.raises(ValueError, match="color: must hold one number for each of the 7"):
            path.plot(mine, color=[1.0])
        plt.close("all")

    def test_nothing_recorded_yet(self):
        with pytest.raises(ValueError, match="holds no network yet"):
            FIPPath(make()[1]).pca()

    def test_matplotlib_is_only_asked_for_to_plot(self, monkeypatch):
        real = builtins.__import__

        def missing(name, *rest, **kw):
            if name.startswith("matplotlib"):
                raise ImportError(name)
            return real(name, *rest, **kw)

        _, optimizer = make()
        with FIPPath(optimizer) as path:
            pass
        monkeypatch.setattr(builtins, "__import__", missing)
        monkeypatch.setattr(
            importlib, "import_module", lambda name, *rest: missing(name, None, None, (), 0)
        )
        with pytest.raises(ImportError, match=r'matplotlib is needed.*"fipoptim\[recipes\]"'):
            path.plot()


class Disk:
    """Stands between a path and its files: fails at chosen writes, or shows the folder at each of them."""

    CALLS = ("save_file", "write_text", "replace", "unlink")

    def __init__(self, monkeypatch):
        import safetensors.torch

        self.before = lambda call, file: None  # may raise
        self.after = lambda call, file: None
        for owner, call in (
            (safetensors.torch, "save_file"),
            (Path, "write_text"),
            (os, "replace"),
            (Path, "unlink"),
        ):
            monkeypatch.setattr(owner, call, self.wrapped(call, getattr(owner, call)))

    def wrapped(self, call, real):
        def function(*args, **keywords):
            file = Path(args[1] if call in ("save_file", "replace") else args[0])
            self.before(call, file)
            result = real(*args, **keywords)
            self.after(call, file)
            return result

        return function

    def fail(self, call, file, error=None):
        """Raise ``error`` at ``call`` for files whose name begins with ``file``; a full disk if None."""

        def before(now, at):
            if now == call and at.name.startswith(file):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if error is None else error

        self.before = before

    def repair(self):
        self.before = lambda call, file: None


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


WRITES = [
    ("save_file", "network-"),
    ("replace", "network-"),
    ("write_text", "index.json"),
    ("replace", "index.json"),
]


def assert_holds(folder, states, steps):
    """The folder opens, as the networks of ``steps``."""
    path = FIPPath.open(folder)
    assert path.steps == steps
    for state, step in zip(path, steps, strict=True):
        assert_same(state, states[step])
    return path


class TestFailedWrites:
    @pytest.mark.parametrize(("call", "file"), WRITES)
    def test_the_step_stands(self, tmp_path, disk, call, file):
        model, optimizer = make()
        plain, plainly = make()
        expected = walk(plain, plainly, 4)
        torch.manual_seed(0)
        TiedNet()  # draws what make() draws
        full = pytest.raises(OSError, match=r"path: .*No space left on device.*")
        with full as raised, FIPPath(optimizer, folder=tmp_path) as path:
            states = walk(model, optimizer, 2)
            disk.fail(call, file)
            # Warnings are errors in these tests, and yet none comes out of a step.
            states += walk(model, optimizer, 2)[1:]
        for state, twin in zip(states, expected, strict=True):
            assert_same(state, twin)
        assert raised.value.errno == errno.ENOSPC
        assert len(list(tmp_path.glob("*.partial"))) == 0
        if file == "index.json":
            assert path.steps == [0, 1, 2, 3, 4]  # in this process all are there
            assert_same(path[4], states[4])
            assert "the last 2 networks could not be listed" in str(raised.value)
        else:
            assert path.steps == [0, 1, 2]
            assert path.missed == [3, 4]
            assert "steps [3, 4] could not be recorded" in str(raised.value)
            assert repr(path).endswith("; steps [3, 4] could not be recorded)")
        assert_holds(tmp_path, states, [0, 1, 2])

    @pytest.mark.parametrize(("call", "file"), WRITES)
    def test_a_warning_names_the_file_and_the_cause_once(self, tmp_path, disk, call, file):
        model, optimizer = make()
        with pytest.raises(OSError), FIPPath(optimizer, folder=tmp_path):
            disk.fail(call, file)
            name = "index.json" if file == "index.json" else "network-00001.safetensors"
            with pytest.warns(RuntimeWarning, match=f"step 1 .*No space left.*{name}") as given:
                walk(model, optimizer, 3)
            assert len(given) == 1

    @pytest.mark.parametrize(("call", "file"), WRITES)
    def test_later_networks_are_tried_again(self, tmp_path, disk, call, file):
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
            sum(
                euclidean(states[a], states[b], model)
                for a, b in zip(steps, steps[1:], strict=False)
            ),
            rel=1e-6,
        )

    @pytest.mark.parametrize(("call", "file"), WRITES)
    def test_the_last_network_is_tried_again_on_leaving(self, tmp_path, disk, call, file):
        model, optimizer = make()
        with FIPPath(optimizer, folder=tmp_path) as path:
            disk.fail(call, file)
            states = walk(model, optimizer, 1)
            disk.repair()
        assert path.missed == []
        assert_holds(tmp_path, states, [0, 1])

    @pytest.mark.parametrize(("call", "file"), WRITES)
    def test_the_start_network(self, tmp_path, disk, call, file):
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

    def test_an_error_of_the_block_is_the_one_that_is_raised(self, tmp_path, disk):
        model, optimizer = make()
        with pytest.raises(KeyError, match="theirs") as raised, FIPPath(optimizer, folder=tmp_path):
            disk.fail("save_file", "network-")
            walk(model, optimizer, 1)
            raise KeyError("theirs")
        (note,) = raised.value.__notes__
        assert "steps [1] could not be recorded" in note
        walk(model, optimizer, 1)  # nothing is recorded any more

    def test_an_error_of_safetensors_itself(self, tmp_path, disk):
        from safetensors import SafetensorError

        model, optimizer = make()
        with (
            pytest.raises(OSError, match=r"network-00001\.safetensors: os error 28"),
            FIPPath(optimizer, folder=tmp_path),
        ):
            disk.fail("save_file", "network-", SafetensorError("os error 28"))
            walk(model, optimizer, 1)

    def test_files_limited_by_the_system(self, tmp_path):
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
    def test_the_folder_is_removed(self, tmp_path, made_again):
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

    def test_the_working_directory_may_change(self, tmp_path, monkeypatch):
        model, optimizer = make()
        monkeypatch.chdir(tmp_path)
        with FIPPath(optimizer, folder="path") as path:
            (tmp_path / "elsewhere").mkdir()
            monkeypatch.chdir(tmp_path / "elsewhere")
            states = walk(model, optimizer, 1)
        assert_same(path[1], states[1])
        assert_holds(tmp_path / "path", states, [0, 1])

    def test_a_network_that_could_not_be_written_is_not_held(self, tmp_path, disk, monkeypatch):
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


class TestNetworksThatCannotBeRecorded:
    def refused(self, folder, match, change):
        """Change the model between two steps; the first and the last network are recorded all the same."""
        model, optimizer = make()
        with (
            pytest.raises(RuntimeError, match=rf"steps \[2\] could not be recorded.*{match}"),
            FIPPath(optimizer, folder=folder) as path,
        ):
            states = walk(model, optimizer, 1)
            undo = change(model)
            optimizer.step()
            undo()
            states += [{}, *walk(model, optimizer, 1)[1:]]
        assert path.steps == [0, 1, 3]
        for i, step in enumerate(path.steps):
            assert_same(path[i], states[step])
        assert math.isfinite(path.length())
        if folder is not None:
            assert_holds(folder, states, [0, 1, 3])

    def test_another_shape(self, folder):
        def change(model):
            weight, model.back.weight = model.back.weight, nn.Parameter(torch.zeros(5, 7))

            def undo():
                model.back.weight = weight

            return undo

        self.refused(folder, r"back\.weight was \(5, 6\) and is \(5, 7\)", change)

    def test_tied_weights_that_are_untied(self, folder):
        def change(model):
            weight = model.again.weight
            model.again.weight = nn.Parameter(weight.detach().clone())

            def undo():
                model.again.weight = weight

            return undo

        self.refused(folder, r"again\.weight was tied to embed\.weight and is \(6, 5\)", change)

    def test_a_parameter_that_is_gone(self, folder):
        def change(model):
            frozen = model.frozen
            del model.frozen

            def undo():
                model.frozen = frozen

            return undo

        self.refused(folder, r"frozen was \(3,\) and is none any more", change)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_weights_that_are_not_finite(self, folder, value):
        def change(model):
            model.frozen.data[0] = value

            def undo():
                model.frozen.data[0] = 1.0

            return undo

        self.refused(folder, "its weights are .* away from those of step 1", change)

    def test_infinite_entries_that_stay_do_not_count(self, folder):
        model, optimizer = make()
        model.frozen.data.copy_(torch.tensor([-math.inf, math.nan, 1.0]))
        with FIPPath(optimizer, folder=folder) as path:
            states = walk(model, optimizer, 2)
        assert torch.equal(path[2]["frozen"][:1], torch.tensor([-math.inf]))
        for state in states:
            state["frozen"].zero_()
        expected = [euclidean(a, b, model) for a, b in zip(states, states[1:], strict=False)]
        assert path.length() == pytest.approx(sum(expected), rel=1e-6)
        assert bool(path.pca()[0].isfinite().all())

    @pytest.mark.parametrize("drift", [math.nan, math.inf, torch.tensor(math.nan), None])
    def test_a_drift_that_is_no_number_is_none(self, folder, drift):
        model, optimizer = make()
        optimizer.anchors.drift = lambda: drift
        with FIPPath(optimizer, folder=folder) as path:
            walk(model, optimizer, 1)
        assert path.drifts == [None, 0.5]
        if folder is not None:
            assert FIPPath.open(folder).drifts == [None, 0.5]

    def test_buffers_may_change_their_shape(self, folder):
        model, optimizer = make()
        model.register_buffer("seen", torch.zeros(0))
        with FIPPath(optimizer, folder=folder) as path:
            walk(model, optimizer, 1)
            model.seen = torch.ones(3)
            walk(model, optimizer, 1)
        assert [len(state["seen"]) for state in path] == [0, 0, 3]
        with pytest.raises(ValueError, match=r"seen is \(3,\) in the model and \(0,\)"):
            path.load_into(model, 0)
        members = path.ensemble(model, [2, 0])
        with pytest.raises(ValueError, match=r"seen is \(3,\) in the model and \(0,\)"):
            members(torch.randn(2, 5))

    def test_extra_state_is_not_kept(self, folder):
        class Counted(TiedNet):
            def get_extra_state(self):
                return {"calls": 3}

            def set_extra_state(self, state):
                raise AssertionError("set")

        model, optimizer = make(net=Counted)
        with FIPPath(optimizer, folder=folder) as path:
            states = walk(model, optimizer, 1)
        path.load_into(model, 0)
        model.load_state_dict(path[0], strict=False)
        assert path[0].keys() == states[0].keys() - {"_extra_state"}

    def test_two_paths_of_one_run(self, tmp_path):
        model, optimizer = make()
        with (
            FIPPath(optimizer, every=2, folder=tmp_path / "a") as first,
            FIPPath(optimizer, every=3) as second,
        ):
            states = walk(model, optimizer, 4)
        assert (first.steps, second.steps) == ([0, 2, 4], [0, 3, 4])
        assert_same(second[1], states[3])
        assert_holds(tmp_path / "a", states, [0, 2, 4])

    def test_entered_twice(self, folder):
        model, optimizer = make()
        with FIPPath(optimizer, folder=folder) as path:
            states = walk(model, optimizer, 1)
            with pytest.raises(RuntimeError, match="being recorded"), path:
                pass
            states += walk(model, optimizer, 1)[1:]
        assert path.steps == [0, 1, 2]
        assert_same(path[2], states[2])


class TestKilled:
    def test_every_state_of_the_folder_can_be_opened_or_recorded_into(self, tmp_path, disk):
        """Copies of the folder before, in the middle of and after each of its changes: a kill leaves one of them."""
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

    def test_a_first_network_without_an_index(self, tmp_path):
        model, optimizer = make()
        with FIPPath(optimizer, folder=tmp_path):
            pass
        (tmp_path / "index.json").unlink()
        with pytest.raises(FileNotFoundError, match="holds no recorded path"):
            FIPPath.open(tmp_path)
        with FIPPath(optimizer, folder=tmp_path):
            states = walk(model, optimizer, 1)
        assert_holds(tmp_path, states, [0, 1])

    def test_networks_whose_index_is_lost_are_not_overwritten(self, tmp_path):
        model, optimizer = make()
        with FIPPath(optimizer, folder=tmp_path):
            walk(model, optimizer, 1)
        for lose in ((tmp_path / "index.json").unlink, lambda: None):
            lose()
            with pytest.raises(FileExistsError, match=r"holds networks and no index\.json"):
                FIPPath(optimizer, folder=tmp_path)
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_damaged_index_is_not_overwritten(self, tmp_path):
        model, optimizer = make()
        with FIPPath(optimizer, folder=tmp_path):
            pass
        (tmp_path / "index.json").write_text("{")
        with pytest.raises(FileExistsError, match="already holds a recorded path"):
            FIPPath(optimizer, folder=tmp_path)
        assert (tmp_path / "index.json").read_text() == "{"

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize(("call", "file"), WRITES)
    def test_an_interrupt_leaves_the_recording_going(self, tmp_path, disk, call, file, when):
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
    def test_an_interrupt_that_ends_the_recording(self, tmp_path, disk, call, file, when):
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a path, and its states; copied before it is damaged."""
    folder = tmp_path_factory.mktemp("whole")
    model, optimizer = make()
    with FIPPath(optimizer, folder=folder):
        states = walk(model, optimizer, 3)
    return folder, states


@pytest.fixture
def damaged(whole, tmp_path):
    return Path(shutil.copytree(whole[0], tmp_path / "damaged"))


@pytest.fixture(scope="module")
def opened_or_refused(whole, tmp_path_factory):
    """Writes an index; what opens with it must be the path, or the beginning of it."""
    folder, states = whole
    damaged = Path(shutil.copytree(folder, tmp_path_factory.mktemp("fuzzed") / "damaged"))
    metadata = FIPPath.open(folder).metadata

    def check(content):
        (damaged / "index.json").write_bytes(content)
        try:
            path = FIPPath.open(damaged)
        except (ValueError, FileNotFoundError) as error:
            assert str(damaged) in str(error)  # noqa: PT017
            return
        assert path.metadata == metadata[: len(path)]
        for i, state in enumerate(path):
            assert_same(state, states[i])

    return check


READS = {
    "item": lambda path: path[1],
    "all": lambda path: list(path),
    "load_into": lambda path: path.load_into(TiedNet(), 1),
    "ensemble": lambda path: path.ensemble(TiedNet()),
    "forward": lambda path: path.ensemble(TiedNet(), [0, 1])(torch.randn(2, 5)),
    "pca": lambda path: path.pca(),
    "plot": lambda path: path.plot(),
}


class TestDamage:
    def refused(self, folder, file, error=ValueError, match=""):
        path = FIPPath.open(folder)
        for name, read in READS.items():
            if name != "ensemble" or "00000" in file:
                with pytest.raises(error, match=f"{match}.*{file}|{file}.*{match}"):
                    read(path)

    @given(st.data())
    @settings(max_examples=40)
    def test_a_flipped_bit(self, whole, data):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(shutil.copytree(whole[0], Path(place) / "damaged"))
            file = folder / "network-00001.safetensors"
            content = bytearray(file.read_bytes())
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(
                st.integers(0, 7)
            )
            file.write_bytes(content)
            self.refused(folder, r"network-00001\.safetensors", match="SHA-256")
            assert_same(FIPPath.open(folder)[2], whole[1][2])

    @pytest.mark.parametrize("kept", [0, 5, 100, -1])
    def test_a_truncated_file(self, damaged, kept):
        file = damaged / "network-00001.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        self.refused(damaged, r"network-00001\.safetensors")

    def test_a_file_that_is_gone_after_opening(self, damaged):
        path = FIPPath.open(damaged)
        (damaged / "network-00001.safetensors").unlink()
        for name in ("item", "load_into", "forward", "pca"):
            with pytest.raises(FileNotFoundError, match=r"network-00001\.safetensors"):
                READS[name](path)

    def test_a_network_of_another_path_or_place(self, damaged, tmp_path):
        model, optimizer = make(seed=7)
        with FIPPath(optimizer, folder=tmp_path / "other"):
            walk(model, optimizer, 1)
        for source in (tmp_path / "other" / "network-00001", damaged / "network-00002"):
            shutil.copy(f"{source}.safetensors", damaged / "network-00001.safetensors")
            self.refused(damaged, r"network-00001\.safetensors", match="SHA-256")

    def test_damage_after_the_first_read(self, damaged):
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
    def test_a_network_that_the_index_vouches_for_and_does_not_fit(self, damaged, change, match):
        files = PathFolder(damaged)
        every, layout, entries = files.read_index()
        state = change(files.read_network(1, layout, entries[1]))
        sha256 = files.write_network(1, {name: tensor.clone() for name, tensor in state.items()})
        entries[1] = dataclasses.replace(entries[1], sha256=sha256)
        files.write_index(every, layout, entries)
        self.refused(damaged, r"network-00001\.safetensors", match=match)

    def test_a_file_that_the_index_vouches_for_and_is_none_of_safetensors(self, damaged):
        files = PathFolder(damaged)
        every, layout, entries = files.read_index()
        files.network(1).write_bytes(b"no network")
        sha256 = hashlib.sha256(b"no network").hexdigest()
        files.write_index(
            every, layout, [entries[0], dataclasses.replace(entries[1], sha256=sha256)]
        )
        self.refused(damaged, r"network-00001\.safetensors", match="no safetensors file")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"every": -3}, "every must be"),
            ({"every": 0}, "every must be"),
            ({"every": "2"}, "every must be"),
            ({"every": 2.0}, "every must be"),
            ({"every": True}, "every must be"),
            ({"every": math.nan}, "NaN is not a number"),
            ({"every": None}, "every must be"),
            ({"every": 2}, "changed after it was written"),
            ({"version": True}, "'version': True"),
            ({"format": None}, "'format': None"),
            ({"more": 1}, "must have"),
            ({"parameters": "abc"}, "parameters must map"),
            ({"parameters": ["scale"]}, "parameters must map"),
            ({"parameters": {"scale": [-1]}}, "parameters must map"),
            ({"parameters": {"scale": [1.5]}}, "parameters must map"),
            ({"parameters": {"scale": []}}, "changed after it was written"),
            ({"aliases": []}, "aliases must map"),
            ({"aliases": {"again.weight": 3}}, "aliases must map"),
            ({"aliases": {"scale": "embed.weight"}}, "aliases must map"),
            ({"aliases": {"a": "b", "b": "c"}}, "aliases must map"),
            ({"aliases": {}}, "changed after it was written"),
            ({"networks": {}}, "networks must be a list"),
            ({"networks": [3]}, r"networks\[0\] must be an object"),
            ({"networks": [{}]}, r"networks\[0\] must have"),
            ({"step": -1}, r"networks\[1\]: step"),
            ({"step": 0}, r"networks\[1\]: step"),
            ({"step": 1.0}, r"networks\[1\]: step"),
            ({"step": "1"}, r"networks\[1\]: step"),
            ({"step": 5}, r"networks\[1\].*changed|networks\[2\]: step"),
            ({"drift": -0.5}, r"networks\[1\]: drift"),
            ({"drift": "0.5"}, r"networks\[1\]: drift"),
            ({"drift": math.inf}, "Infinity is not a number"),
            ({"drift": 1}, r"networks\[1\]: drift"),
            ({"drift": 0.25}, r"networks\[1\].*changed after"),
            ({"drift": None}, r"networks\[1\].*changed after"),
            ({"length": -1.0}, r"networks\[1\]: length"),
            ({"length": None}, r"networks\[1\]: length"),
            ({"length": [1.0]}, r"networks\[1\]: length"),
            ({"length": -math.inf}, "-Infinity is not a number"),
            ({"length": 1e-3}, r"networks\[1\].*changed after"),
            ({"sha256": 3}, r"networks\[1\].*changed after"),
            ({"crc32": None}, r"networks\[1\].*changed after"),
        ],
    )
    def test_an_index_that_was_not_written_so(self, damaged, change, match):
        file = damaged / "index.json"
        index = json.loads(file.read_text())
        (name,) = change
        if name in index["networks"][1]:
            index["networks"][1] |= change
        else:
            index |= change
        file.write_text(json.dumps(index))
        with pytest.raises(ValueError, match=rf"index\.json is not the index .*(?:{match})"):
            FIPPath.open(damaged)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"[" * 100_000,
            b"\xff\xfe",
            b"null",
            b"[]",
            b'{"every": 1' + b"0" * 5000 + b"}",
            b'"' + b"x" * 10_000 + b'"',
        ],
    )
    def test_an_index_that_is_none(self, damaged, content):
        (damaged / "index.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"index\.json is not the index") as raised:
            FIPPath.open(damaged)
        assert len(str(raised.value)) < 1000

    def test_numbers_beyond_any_float(self, damaged):
        file = damaged / "index.json"
        file.write_text(file.read_text().replace('"drift": 0.5', '"drift": 1e999'))
        with pytest.raises(ValueError, match=r"networks\[1\]: drift"):
            FIPPath.open(damaged)

    @given(st.data())
    @settings(max_examples=200)
    def test_changed_bytes_of_the_index(self, whole, opened_or_refused, data):
        content = bytearray((whole[0] / "index.json").read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            if not content:
                break
            at = data.draw(st.integers(0, len(content) - 1))
            match data.draw(st.sampled_from(["set", "insert", "delete", "cut"])):
                case "set":
                    content[at] = data.draw(st.integers(0, 255))
                case "insert":
                    content.insert(at, data.draw(st.sampled_from(b'0123456789-.eE"{}[],: \n')))
                case "delete":
                    del content[at]
                case "cut":
                    del content[at + 1 :]
        opened_or_refused(bytes(content))

    @given(st.data())
    @settings(max_examples=200)
    def test_changed_values_of_the_index(self, whole, opened_or_refused, data):
        index = json.loads((whole[0] / "index.json").read_text())
        at = index
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(at[key], (dict, list)) or not at[key] or data.draw(st.booleans()):
                break
            at = at[key]
        leaves = (
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(max_size=5)
            | st.sampled_from(["scale", "embed.weight", *at] if isinstance(at, dict) else [0, 1])
        )
        values = st.recursive(
            leaves,
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=5), inner, max_size=3)
            ),
            max_leaves=4,
        )
        match data.draw(st.sampled_from(["set", "delete", "copy"])):
            case "set":
                at[key] = data.draw(values)
            case "delete":
                del at[key]
            case "copy":
                at[key] = copy.deepcopy(at[data.draw(st.sampled_from(keys))])
        opened_or_refused(json.dumps(index).encode())


class TestArguments:
    @pytest.mark.parametrize("every", [None, math.nan, [1], torch.tensor(True), torch.tensor(2.0)])
    def test_every_must_be_a_count(self, every):
        with pytest.raises(ValueError, match="every: must be a whole number"):
            FIPPath(make()[1], every=every)

    def test_whole_numbers_of_other_libraries(self, tmp_path):
        import numpy as np

        model, optimizer = make()
        with FIPPath(optimizer, every=np.int64(2), folder=tmp_path) as path:
            states = walk(model, optimizer, 4)
        assert FIPPath.open(tmp_path).every == 2
        assert_same(path[np.int32(-1)], states[4])
        assert_same(path[torch.tensor(1)], states[2])
        assert path.ensemble(model, np.array([0, -1])).indices == (0, 2)
        assert path.ensemble(model, torch.tensor([1])).indices == (1,)
        torch.testing.assert_close(path.pca(np.int64(1))[0], path.pca(1)[0], rtol=0, atol=0)

    @pytest.mark.parametrize("folder", [3, b"folder", True, ["folder"], 1.5])
    def test_a_folder_must_be_a_path(self, folder):
        for take in (FIPPath.open, lambda folder: FIPPath(make()[1], folder=folder)):
            with pytest.raises(TypeError, match="folder: must be a path"):
                take(folder)

    @pytest.mark.parametrize("i", [True, 1.0, "1", None, torch.tensor(1.0), torch.tensor(True)])
    def test_an_index_must_be_a_whole_number(self, recorded, i):
        model, path, _ = recorded
        takes = (
            path.__getitem__,
            lambda i: path.load_into(model, i),
            lambda i: path.ensemble(model, [i]),
        )
        for take in takes:
            with pytest.raises(TypeError, match="index: must be one whole number"):
                take(i)

    @pytest.mark.parametrize("indices", [3, 1.5, True])
    def test_indices_must_be_several(self, recorded, indices):
        model, path, _ = recorded
        with pytest.raises(TypeError, match=r"indices: must be several whole numbers"):
            path.ensemble(model, indices)

    @pytest.mark.parametrize("components", [0, -1, 1.0, True, "2", None, math.nan])
    def test_components_must_be_a_count(self, recorded, components):
        with pytest.raises(ValueError, match="components: must be a whole number"):
            recorded[1].pca(components)

    @pytest.mark.parametrize("model", [None, {}, [nn.Linear(1, 1)], TiedNet])
    def test_a_model_must_be_a_module(self, recorded, model):
        _, path, _ = recorded
        for take in (lambda: path.load_into(model, 0), lambda: path.ensemble(model)):
            with pytest.raises(TypeError, match="model: must be a torch.nn.Module"):
                take()

    def test_the_dimension_of_the_classes(self, recorded):
        model, path, _ = recorded
        for dim in (1.0, None, True, "1"):
            with pytest.raises(TypeError, match="dim: must be a whole number"):
                path.ensemble(model, dim=dim)
        with pytest.raises(IndexError, match=r"dim: .*\(2, 5\), have no dimension 2"):
            path.ensemble(model, dim=2)(torch.randn(2, 5))

    @pytest.mark.parametrize(
        "scale", [torch.ones((), device="meta"), torch.ones((), dtype=torch.complex64)]
    )
    def test_models_that_cannot_hold_the_values(self, recorded, scale):
        _, path, _ = recorded
        model = TiedNet()
        model.scale = nn.Parameter(scale)
        for take in (lambda: path.load_into(model, 0), lambda: path.ensemble(model)):
            with pytest.raises(ValueError, match=r"scale is (on the meta device|torch\.complex64)"):
                take()

    def test_weights_are_not_cast_to_whole_numbers(self, recorded):
        _, path, _ = recorded
        model = TiedNet()
        model.frozen = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(
            ValueError, match=r"frozen is torch\.int8 in the model and torch\.float32"
        ):
            path.load_into(model, 0)
        assert_same(model.state_dict(), before)

    def test_colours(self, recorded):
        import matplotlib.pyplot as plt

        _, path, _ = recorded
        for color in ("viridis", ["a"] * 7, 3, [[1.0, 2.0]] * 7):
            with pytest.raises(ValueError, match="color: must hold one number"):
                path.plot(color=color)
        shown = path.plot(color=[None, *range(1, 7)]).collections[0].get_array()
        assert shown[1:].tolist() == list(range(1, 7))
        assert not bool(shown[0] == shown[0])  # drawn as missing
        path.plot(color=torch.arange(7.0))
        plt.close("all")

    def test_networks_of_several_dtypes(self, folder):
        model, optimizer = make()
        with FIPPath(optimizer, folder=folder) as path:
            walk(model, optimizer, 1)
            model.double()
            optimizer.step()
            model.bfloat16()
            optimizer.step()
        assert [state["scale"].dtype for state in path] == [
            torch.float32, torch.float32, torch.float64, torch.bfloat16,
        ]  # fmt: skip
        x = torch.randn(3, 5)
        expected = torch.zeros(3, 5)
        for state in path:
            member = TiedNet().eval()
            member.load_state_dict(state)
            expected += member(x).softmax(-1)
        torch.testing.assert_close(path.ensemble(TiedNet())(x), expected)
        assert bool(path.pca()[0].isfinite().all())

    def test_a_forward_that_writes_to_a_buffer_leaves_the_path_alone(self, folder):
        class Counting(TiedNet):
            def __init__(self):
                super().__init__()
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x):
                self.calls += 1
                return super().forward(x)

        model, optimizer = make(net=Counting)
        with FIPPath(optimizer, folder=folder) as path:
            pass
        path.ensemble(model)(torch.randn(2, 5))
        assert float(path[0]["calls"]) == 0.0

    def test_signs_of_zero_are_kept_and_are_no_way(self, folder):
        model, optimizer = make()
        model.frozen.data.fill_(-0.0)
        with FIPPath(optimizer, folder=folder) as path:
            model.frozen.data.fill_(0.0)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
        assert path.length() == 0.0
        assert bool(path[0]["frozen"].signbit().all())
        assert not bool(path[1]["frozen"].signbit().any())

    def test_complex_parameters_are_measured_in_both_parts(self, folder):
        model, optimizer = make()
        model.frozen = nn.Parameter(torch.zeros(3, dtype=torch.complex64), requires_grad=False)
        with FIPPath(optimizer, folder=folder) as path:
            for p in model.parameters():
                p.grad = None
            model.frozen.data[0] = 3 + 4j
            optimizer.step()
        assert path.length() == 5.0
        assert path.pca(1)[0].flatten().abs().tolist() == pytest.approx([2.5, 2.5], abs=1e-12)
