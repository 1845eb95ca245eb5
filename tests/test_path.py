"""FIPPath: what is recorded, on disk and in memory, and what can be done with it afterwards."""

import builtins
import copy
import importlib
import json
import math
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from torch import nn

from fipoptim import AnchorBatch, FIPOptimizer
from fipoptim.path import FIPPath

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
        monkeypatch.setattr("fipoptim.path._PCA_BYTES", budget)
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
