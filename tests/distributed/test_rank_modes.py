"""Several ranks take the path that one process takes with the same anchors and the whole batches."""

import pytest
import torch
from modes import MODES, ON_FOUR

# Relative to how far the run has moved; float64.
TOLERANCE = 1e-5
RUNS = [(mode, 2) for mode in MODES] + [(mode, 4) for mode in MODES if mode in ON_FOUR]
ANCHORS = {"uneven": 50, "measures": 50, "texts": 15, "refresh-extend": 55}
WITH_PRODUCTS = {
    *("adaptive", "adam", "muon", "products-3", "no-correction", "momentum", "groups"),
    *("keep-zeros", "replicate", "L=0", "draws", "augmentation", "uneven", "chunks", "half"),
    *("live", "likely-classes", "texts", "double-vjp", "finite-difference", "both-bounds"),
    *("in-pairs", "each-by-itself"),
}


@pytest.mark.parametrize(("mode", "size"), RUNS)
def test_all_ranks_hold_the_same_bits(values, mode, size):
    first, *others = values(size, mode)
    assert torch.isfinite(first["path"]).all()
    for other in others:
        assert first.keys() == other.keys()
        for name in ("path", "figures", "reference", "state"):
            assert torch.equal(first[name], other[name]), name
        assert first["products"] == other["products"]


# Statistics of a rank's part of a batch are not those of the whole batch, so the path of batch norm is another one.
@pytest.mark.parametrize(("mode", "size"), [run for run in RUNS if run[0] != "batch-norm"])
def test_the_path_is_that_of_one_process(values, mode, size):
    (alone,), found = values(1, mode), values(size, mode)[0]
    assert found["anchors"] == alone["anchors"] == ANCHORS.get(mode, 48)
    assert found["products"] == alone["products"]
    start = alone["path"][0]
    assert torch.equal(found["path"][0], start)
    moved = (alone["path"] - start).norm(dim=1)
    error = (found["path"] - alone["path"]).norm(dim=1)
    assert (error <= TOLERANCE * moved).all(), (error / moved).nan_to_num().max()
    for name in ("figures", "reference", "state"):
        torch.testing.assert_close(found[name], alone[name], rtol=TOLERANCE, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_does_what_it_is_named_for(values, mode):
    (alone,) = values(1, mode)
    if mode != "measures":
        assert (alone["path"][-1] - alone["path"][0]).norm() > 0.05
    assert (sum(alone["products"]) > 0) == (mode in WITH_PRODUCTS)


@pytest.mark.parametrize("size", [2, 4])
def test_anchors_are_evaluated_with_the_statistics_of_rank_0(values, size):
    """The ranks' own statistics differ, and stay as they are."""
    first, *others = (each["own"] for each in values(size, "batch-norm"))
    assert first["drift"] == pytest.approx(first["drift_alone"], rel=1e-9)
    assert first["buffers_kept"]
    for other in others:
        assert other["drift"] == first["drift"]
        assert other["drift_alone"] != pytest.approx(first["drift"], rel=1e-6)
        assert other["buffers_kept"]


def test_a_metric_has_the_rows_of_its_rank(values):
    own = [each["own"] for each in values(2, "measures")]
    assert [each["rows"] for each in own] == [each["jvp"] for each in own] == [25, 25]
