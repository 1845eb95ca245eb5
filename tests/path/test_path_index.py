"""Indices that were changed after they were written: they are refused, or open as the path or its beginning."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from walks import assert_same

from fipoptim.path.record import FIPPath


@pytest.fixture(scope="module")
def opened_or_refused(undamaged, tmp_path_factory):
    """Writes an index. Opening the folder must then fail, or give the path or its beginning."""
    folder, states = undamaged
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
def test_an_index_with_a_changed_entry_is_refused(damaged, change, match):
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
def test_a_file_that_is_not_an_index_is_refused(damaged, content):
    (damaged / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.json is not the index") as raised:
        FIPPath.open(damaged)
    assert len(str(raised.value)) < 1000


def test_an_index_with_an_infinite_number_is_refused(damaged):
    file = damaged / "index.json"
    file.write_text(file.read_text().replace('"drift": 0.5', '"drift": 1e999'))
    with pytest.raises(ValueError, match=r"networks\[1\]: drift"):
        FIPPath.open(damaged)


@given(st.data())
@settings(max_examples=200)
def test_an_index_with_changed_bytes_is_refused_or_opens_part_of_the_path(
    undamaged, opened_or_refused, data
):
    content = bytearray((undamaged[0] / "index.json").read_bytes())
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
def test_an_index_with_changed_values_is_refused_or_opens_part_of_the_path(
    undamaged, opened_or_refused, data
):
    index = json.loads((undamaged[0] / "index.json").read_text())
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
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
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
