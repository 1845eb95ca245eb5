"""What ranks compute and tell each other grows with their number and with products as it should."""

import json

import pytest
from counts import COUNTS

SIZES = (2, 4)
CHECK, ALL = 16, 48


@pytest.mark.parametrize("size", SIZES)
def test_each_rank_evaluates_its_share_of_the_anchors(values, size):
    found = values(size, "rows")
    (alone,) = values(1, "rows")
    assert alone["drift"] == alone["kept"] == alone["measure"] == ALL
    assert alone["check"] == CHECK
    for each in found:
        assert each == {name: rows / size for name, rows in alone.items()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "case",
    ["products-0", "products-1", "products-3", "products-8", "adaptive", "chunks", "draws", "live"],
)
def test_a_step_sums_one_vector_for_the_pull_and_one_for_each_product(values, case, size):
    """The last product that is allowed is half a product: the square of J v is a number."""
    for found in values(size, f"calls of {case}"):
        halves = 0 < found["products"] == found["allowed"]
        assert found["vectors"] == 1 + found["products"] - halves
        assert found["vector_bytes"] == 8 * found["weights"] * found["vectors"]


@pytest.mark.parametrize("size", SIZES)
def test_what_else_is_told_is_a_few_numbers(values, size):
    for found in values(size, "calls of products-3"):
        assert found["other_bytes"] < 1000
    for case in ("drift", "measure"):
        for found in values(size, f"calls of {case}"):
            assert found["vectors"] == 0
            assert 0 < found["other_bytes"] < 100


@pytest.mark.parametrize("size", SIZES)
def test_a_settlement_sums_a_vector_a_product_and_a_step(values, size):
    for found in values(size, "calls of settle"):
        assert found["vectors"] == found["steps"] + found["products"] > 0


def test_one_process_tells_nothing(values):
    for case in ("products-3", "a budget", "drift", "settle"):
        (found,) = values(1, f"calls of {case}")
        assert found["vectors"] == found["others"] == found["other_bytes"] == 0


def test_the_table_can_be_written_as_json(values):
    table = {case: values(2, case)[0] for case in COUNTS}
    assert json.loads(json.dumps(table)) == table
