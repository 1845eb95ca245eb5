"""The networks that are recorded while an optimizer steps, in memory and on disk."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from walks import Follower, TiedNet, assert_holds, assert_same, euclidean, make, walk

from fipoptim import AnchorBatch, FIPOptimizer
from fipoptim.path.record import FIPPath


@pytest.mark.parametrize(
    ("every", "steps"),
    [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (5, [0, 5]), (9, [0, 5])],
)
def test_the_start_every_kth_and_the_last_network_are_recorded(folder, every, steps):
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


def test_nothing_is_recorded_after_the_with_block(folder):
    model, optimizer = make()
    with FIPPath(optimizer, folder=folder) as path:
        walk(model, optimizer, 2)
    walk(model, optimizer, 2)
    assert len(path) == 3
    with pytest.raises(RuntimeError, match="recorded already"), path:
        pass


def test_a_recording_without_a_step_holds_the_start_network(folder):
    model, optimizer = make()
    with FIPPath(optimizer, folder=folder) as path:
        pass
    assert path.steps == [0]
    assert path.length() == 0.0
    assert_same(path[0], model.state_dict())


def test_an_error_in_the_with_block_is_raised_and_the_last_network_is_recorded(folder):
    model, optimizer = make()
    path = FIPPath(optimizer, every=10, folder=folder)
    with pytest.raises(KeyError, match="theirs"), path:
        states = walk(model, optimizer, 3)
        raise KeyError("theirs")
    assert path.steps == [0, 3]
    assert_same(path[-1], states[-1])
    walk(model, optimizer, 1)
    assert len(path) == 2


def test_a_path_can_be_read_while_it_is_recorded(folder):
    model, optimizer = make()
    with FIPPath(optimizer, folder=folder) as path:
        states = walk(model, optimizer, 2)
        assert_same(path[-1], states[-1])
        if folder is not None:
            assert_same(FIPPath.open(folder)[1], states[1])


def test_a_path_in_a_folder_keeps_its_weights_only_on_disk(tmp_path):
    model, optimizer = make()
    with FIPPath(optimizer, folder=tmp_path) as path:
        walk(model, optimizer, 3)
        # The distance to the next network is measured from these.
        assert len(path._networks._last_parameters) == 1
    assert not path._networks._last_parameters
    assert len(pickle.dumps(path)) < 4000  # the pickle holds only the index
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["index.json", *(f"network-{i:05d}.safetensors" for i in range(4))]
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "network-00002.safetensors")
    assert stored.keys() == model.state_dict().keys() - {"again.weight"}


def test_memory_format_does_not_matter(folder):
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    with FIPPath(Follower(model), folder=folder) as path:
        pass
    assert_same(path[0], model.state_dict())
    path.load_into(model, 0)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_run_of_the_optimizer(folder):
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
def test_every_must_be_a_count(every):
    with pytest.raises(ValueError, match="every: must be a whole number"):
        FIPPath(make()[1], every=every)


@pytest.mark.parametrize("every", [None, math.nan, [1], torch.tensor(True), torch.tensor(2.0)])
def test_every_must_be_a_whole_number(every):
    with pytest.raises(ValueError, match="every: must be a whole number"):
        FIPPath(make()[1], every=every)


def test_two_paths_can_record_one_run(tmp_path):
    model, optimizer = make()
    with (
        FIPPath(optimizer, every=2, folder=tmp_path / "a") as first,
        FIPPath(optimizer, every=3) as second,
    ):
        states = walk(model, optimizer, 4)
    assert (first.steps, second.steps) == ([0, 2, 4], [0, 3, 4])
    assert_same(second[1], states[3])
    assert_holds(tmp_path / "a", states, [0, 2, 4])


def test_a_path_cannot_be_entered_twice(folder):
    model, optimizer = make()
    with FIPPath(optimizer, folder=folder) as path:
        states = walk(model, optimizer, 1)
        with pytest.raises(RuntimeError, match="being recorded"), path:
            pass
        states += walk(model, optimizer, 1)[1:]
    assert path.steps == [0, 1, 2]
    assert_same(path[2], states[2])


def test_extra_state_is_not_kept(folder):
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


def test_signs_of_zero_are_recorded_and_add_no_length(folder):
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


def test_complex_parameters_are_measured_in_both_parts(folder):
    model, optimizer = make()
    model.frozen = nn.Parameter(torch.zeros(3, dtype=torch.complex64), requires_grad=False)
    with FIPPath(optimizer, folder=folder) as path:
        for p in model.parameters():
            p.grad = None
        model.frozen.data[0] = 3 + 4j
        optimizer.step()
    assert path.length() == 5.0
    assert path.pca(1)[0].flatten().abs().tolist() == pytest.approx([2.5, 2.5], abs=1e-12)
