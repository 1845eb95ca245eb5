"""Each library on two ranks: they end with the same bits, as one process does, and resume bit for bit."""

from pathlib import Path

import pytest
import test_lightning
import test_transformers
import torch
from accelerate.state import AcceleratorState, GradientState
from torchrun import on_two_ranks
from two_ranks import RUNS

pytestmark = [
    *test_lightning.pytestmark,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # Lightning, of a resumed run
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder that two ranks have written, and what each of them found."""
    out = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("two_ranks.py")
    return out, on_two_ranks(script, out, limit=900)


@pytest.fixture(params=RUNS)
def found(request, launched):
    """The name of a library, and what each rank found with it."""
    return request.param, *(rank[request.param] for rank in launched[1])


def equal(one, two):
    return all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


def test_ranks_end_with_the_same_bits_which_are_those_of_one_process(found, tmp_path):
    name, one, two = found
    assert equal(one["weights"], two["weights"])
    assert one["drift"] == two["drift"] > 0
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    alone = RUNS[name](tmp_path)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for p, q in zip(alone["weights"], one["weights"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert one["drift"] == pytest.approx(alone["drift"], rel=1e-3)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(found):
    _, *ranks = found
    for rank in ranks:
        assert equal(rank["weights"], rank["resumed"])


def test_ranks_have_different_batches(launched):
    for rank in launched[1]:
        assert not torch.equal(*rank["accelerate"]["gradients"])


def test_every_rank_settles_and_logs(launched):
    """The budget is settled together, and the logs of the Trainer are the same on each rank."""
    one, two = (rank["transformers"] for rank in launched[1])
    for logs, others in zip(one["logs"], two["logs"], strict=True):
        assert logs["drift"] == others["drift"]
        assert logs["loss"] == others["loss"]
    assert [entry["step"] for entry in one["logs"]] == [1, 2, 3, 4]
    assert max(entry.get("settle_drift_before", 0) for entry in one["logs"]) > (
        test_transformers.MAX_DRIFT
    )
    assert one["drift"] <= test_transformers.MAX_DRIFT
    for rank in launched[1]:
        assert rank["lightning"]["drift"] <= test_lightning.MAX_DRIFT
        assert rank["lightning"]["logged"] == launched[1][0]["lightning"]["logged"] > 0


def test_rank_0_saves(launched):
    out, _ = launched
    assert (out / "transformers" / "checkpoint-4" / "optimizer.pt").exists()
    assert len(list((out / "lightning" / "lightning_logs").iterdir())) == 1
