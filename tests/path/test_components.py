"""The principal components of a path against those of the dense weights, and the plot in their plane."""

import builtins
import importlib
import math

import matplotlib
import pytest
import torch
from walks import make

from fipoptim.path.components import parameter_blocks
from fipoptim.path.record import FIPPath

matplotlib.use("Agg")


def centred_weights(states, model):
    names = [name for name, _ in model.named_parameters()]
    rows = torch.stack([torch.cat([s[n].flatten().double() for n in names]) for s in states])
    return rows - rows.mean(0)


@pytest.mark.parametrize("budget", [8 * 7, 8 * 7 * 11, 2**28])
def test_pca_is_that_of_the_dense_weights(recorded, monkeypatch, budget):
    model, path, states = recorded
    monkeypatch.setattr("fipoptim.path.components.PCA_BLOCK_BYTES", budget)
    u, s, _ = torch.linalg.svd(centred_weights(states, model), full_matrices=False)
    coordinates, shares = path.pca(3)
    expected = u[:, :3] * s[:3]
    signs = torch.where((coordinates * expected).sum(0) < 0, -1.0, 1.0)
    torch.testing.assert_close(coordinates, expected * signs, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(shares, s.square()[:3] / s.square().sum())
    assert bool((coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True)) > 0).all())


def test_blocks_stay_within_their_width(recorded):
    model, path, states = recorded
    blocks = list(parameter_blocks(path._networks, 13))
    assert max(block.shape[1] for block in blocks) <= 13
    joined = torch.cat(blocks, dim=1)
    torch.testing.assert_close(joined - joined.mean(0), centred_weights(states, model))


def test_more_components_than_networks_are_padded_with_zeros():
    _, optimizer = make()
    with FIPPath(optimizer) as path:
        pass
    coordinates, shares = path.pca(2)
    assert coordinates.tolist() == [[0.0, 0.0]]
    assert shares.tolist() == [0.0, 0.0]


def test_plot(recorded):
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


def test_pca_of_a_path_without_networks_raises():
    with pytest.raises(ValueError, match="holds no network yet"):
        FIPPath(make()[1]).pca()


def test_matplotlib_is_only_asked_for_to_plot(monkeypatch):
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
    with pytest.raises(ImportError, match=r"matplotlib is needed.*pip install matplotlib"):
        path.plot()


@pytest.mark.parametrize("components", [0, -1, 1.0, True, "2", None, math.nan])
def test_components_must_be_a_count(recorded, components):
    with pytest.raises(ValueError, match="components: must be a whole number"):
        recorded[1].pca(components)


def test_colours_of_a_plot_must_be_one_number_for_each_network(recorded):
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
