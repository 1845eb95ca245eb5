"""Bad input is refused on every rank, by a clear error, and no weight has changed; nothing hangs."""

import re

import pytest
from refusals import REFUSALS

pytestmark = pytest.mark.xdist_group("ranks")
SIZES = (2, 4)
EXPECTED = {}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", REFUSALS)
def test_every_rank_refuses(values, case, size):
    kind, message = EXPECTED[case]
    for told in values(size, case):
        for each in told if isinstance(told, list) else [told]:
            assert each["type"] == kind, each["message"]
            assert re.search(message, each["message"]), each["message"]
            assert each["kept"]
