"""Two ranks record one path: rank 0 writes its folder, and both know and miss the same networks."""

from pathlib import Path

import pytest
from torchrun import on_two_ranks
from walks import assert_same

from fipoptim import FIPPath


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder that two ranks have written, and what each of them found."""
    out = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("two_ranks.py")
    return out, on_two_ranks(script, out, limit=600)


def test_the_folder_holds_the_networks_that_every_rank_has(launched):
    out, ranks = launched
    path = FIPPath.open(out / "whole")
    assert path.steps == [0, 2, 4, 5]
    for rank in ranks:
        for kind in ("folder", "memory"):
            assert rank["whole"][kind]["steps"] == path.steps
            assert rank["whole"][kind]["drifts"] == path.drifts
            assert rank["whole"][kind]["length"] == path.length() > 0
        for state, kept in zip(path, rank["whole"]["networks"], strict=True):
            assert_same(state, kept)
    assert sorted(file.name for file in (out / "whole").iterdir()) == [
        "index.json",
        *(f"network-{i:05d}.safetensors" for i in range(4)),
    ]


def test_another_rank_has_no_networks_of_a_folder(launched):
    first, second = (found["whole"] for found in launched[1])
    assert first["read"] == first["principal"] == "none"
    for key in ("read", "principal"):
        assert second[key].startswith("RuntimeError: path: rank 0 has written its networks in")
        assert "FIPPath.open(folder)" in second[key]
    assert first["opened"] == second["opened"] == ["none"]


def test_a_refusal_is_one_on_every_rank(launched):
    for found in launched[1]:
        assert found["whole"]["again"].startswith("FileExistsError: ")
        assert (
            "every: differs between the ranks: 1 on rank 0, 2 on rank 1"
            in found["whole"]["differs"]
        )


def test_a_network_that_rank_0_cannot_write_is_missed_by_all(launched):
    out, ranks = launched
    for found in ranks:
        assert found["full_disk"]["missed"] == [2]
        assert found["full_disk"]["warned"] == 1
        assert found["full_disk"]["steps"] == [0, 1, 3, 4, 5]
        assert found["full_disk"]["error"].startswith("OSError: ")
        assert "No space left on device" in found["full_disk"]["error"]
    assert FIPPath.open(out / "full_disk").steps == [0, 1, 3, 4, 5]


def test_no_rank_waits_at_the_end_for_one_that_gave_up(launched):
    out, ranks = launched
    assert ranks[0]["interrupted"]["error"] == "ValueError: of rank 0"
    assert ranks[1]["interrupted"]["error"] == "KeyError: 'of rank 1'"
    assert ranks[0]["interrupted"]["steps"] == ranks[1]["interrupted"]["steps"] == [0, 2, 4]
    assert FIPPath.open(out / "interrupted").steps == [0, 2, 4]
