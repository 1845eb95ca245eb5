"""recipes.common.files, recipes.common.report and the tables: what recipes write and print."""

import math

import pytest

from recipes.common import files, report
from recipes.continual import tables as continual_tables
from recipes.continual.tables import Row


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    keywords = {"recipe": "r", "config": {}, "environment": {}}
    with pytest.raises(TypeError):
        report.write_results(path, metrics={"unwritable": object()}, **keywords)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_tables_show_what_is_known():
    rows = [Row("accuracy", "accuracy (%)", ".2f", compared=True), Row("peak", "peak (MB)", ".0f")]
    path = [{"accuracy": 0.25, "peak": None}, {"accuracy": 0.75, "peak": None}]
    other = [{"accuracy": 0.25, "peak": 1.0}, {"accuracy": 1.0, "peak": 3.0}]
    one = continual_tables.summary({"fip": path[:1], "ewc": other[:1]}, rows)
    assert "±" not in one
    text = continual_tables.summary({"fip": path, "ewc": other}, rows)
    beside, paired = text.split("paired differences")
    for shown in ("0.50 ± 0.35", "unknown", "2 ± 1"):
        assert shown in beside
    assert "-0.12 ± 0.12" in paired
    assert "peak" not in paired
    for part in (beside.rstrip(), paired.split("\n", 1)[1]):
        assert len({len(line) for line in part.splitlines()}) == 1  # aligned
    assert "paired" not in continual_tables.summary({"ewc": path, "gem": other}, rows)


def test_json_has_innermost_lists_and_mappings_on_a_line(tmp_path):
    content = {
        "rows": [[1.5, None, 3], [], [math.pi]],
        "names": ["a", "[\n  1,\n  2]", '"],  ['],
        "runs": [{"seed": 0, "of": [1, 2, True]}, {"seed": 1, "found": 0.25}],
    }
    files.write_json(tmp_path / "a.json", content)
    assert files.read_json(tmp_path / "a.json") == content
    lines = [line.strip() for line in (tmp_path / "a.json").read_text().splitlines()]
    assert {"[1.5, null, 3],", '"of": [1, 2, true]', '{"seed": 1, "found": 0.25}'} <= {*lines}


def test_paired_differences_need_the_same_seeds():
    with pytest.raises(ValueError, match="shorter"):
        report.paired([{"a": 1.0}, {"a": 2.0}], [{"a": 1.0}])
