"""recipes.common.experiment: the runs that are done, and the files that a resumed run reuses or refuses."""

import argparse

import pytest
import torch

from recipes.common import stored
from recipes.common.data import DataError
from recipes.common.experiment import Experiment


class Counting(Experiment[int, int]):
    """Each method counts to the seed in two halves; ``log`` lists the parts that were run."""

    start_files = ("start.safetensors",)
    start_keys = ("seed",)

    def __init__(self, out, limit=10, suffix=".json", interrupt=None):
        super().__init__(out, {"limit": limit}, ["a", "b"])
        self.result_suffix = suffix
        self.interrupt, self.log = interrupt, []

    def start(self, seed):
        file = self.folder(seed) / "start.safetensors"
        if file.exists():
            return int(stored.load_tensors(file, self.start_config_of(seed))["count"])
        self.log.append(("start", seed))
        stored.save_tensors(file, {"count": torch.tensor(seed)}, self.start_config_of(seed))
        return seed

    def run_method(self, seed, method, start, partial, save):
        for half in range(0 if partial is None else partial["half"] + 1, 2):
            if (seed, method, half) == self.interrupt:
                raise KeyboardInterrupt
            self.log.append((seed, method, half))
            save({"half": half, "count": start * (half + 1)})

    def is_finished(self, content):
        return content["half"] == 1

    def result_of(self, content):
        return content["count"]

    def on_result(self, seed, method, result):
        self.log.append((seed, method, "done"))

    def on_seed(self, seed, methods):
        self.log.append((seed, "all done"))


WHOLE = [(2, "a", 0), (2, "a", 1), (2, "a", "done"), (2, "b", 0), (2, "b", 1), (2, "b", "done")]


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_every_method_of_every_seed_runs_once(suffix, tmp_path):
    first = Counting(tmp_path, suffix=suffix)
    assert first.run([2, 3], ["a", "b"]) == {"a": [4, 6], "b": [4, 6]}
    assert first.log[:8] == [("start", 2), *WHOLE, (2, "all done")]
    again = Counting(tmp_path, suffix=suffix)
    again.check([2, 3])
    assert again.run([3, 2], ["b"]) == {"b": [6, 4]}
    assert again.log == [(3, "all done"), (2, "all done")]


@pytest.mark.parametrize("interrupt", [(2, "a", 1), (2, "b", 0), (2, "b", 1), (3, "a", 0)])
def test_an_interrupted_run_goes_on_where_it_stopped(interrupt, tmp_path):
    stopped = Counting(tmp_path, interrupt=interrupt)
    with pytest.raises(KeyboardInterrupt):
        stopped.run([2, 3], ["a", "b"])
    resumed = Counting(tmp_path)
    assert resumed.run([2, 3], ["a", "b"]) == {"a": [4, 6], "b": [4, 6]}
    halves = [entry for entry in stopped.log + resumed.log if entry[-1] in (0, 1)]
    assert sorted(halves) == sorted((s, m, half) for s in (2, 3) for m in "ab" for half in (0, 1))


def test_a_new_run_deletes_other_results_and_a_resumed_run_refuses_them(tmp_path, capsys):
    parser = argparse.ArgumentParser(prog="count")
    Counting(tmp_path).run([2], ["a"])
    other = Counting(tmp_path, limit=5)
    with pytest.raises(SystemExit) as exit:
        other.prepare(parser, [2], resume=True)
    assert exit.value.code == 2
    assert (
        "a.json is of another configuration (limit 10 there, 5 asked for)"
        in capsys.readouterr().err
    )
    with pytest.raises(DataError, match="another configuration"):
        other.finished(2, "a")
    other.prepare(parser, [2], resume=False)
    assert other.finished(2, "a") is None
    assert other.run([2], ["a"]) == {"a": [4]}
    assert other.log[0] == ("start", 2)


def test_a_start_file_is_reused_by_runs_with_the_same_start_configuration(tmp_path):
    Counting(tmp_path).run([2], ["a"])
    (tmp_path / "seed-2" / "a.json").unlink()
    other = Counting(tmp_path, limit=5)
    other.check([2])
    other.run([2], ["a"])
    assert ("start", 2) not in other.log
    stored.save_tensors(tmp_path / "seed-2" / "start.safetensors", {}, {"seed": 7})
    with pytest.raises(DataError, match="seed 7 there, 2 asked for"):
        other.check([2])


def test_a_result_that_was_never_saved_is_an_error(tmp_path):
    class Forgetful(Counting):
        def run_method(self, seed, method, start, partial, save):
            save({"half": 0, "count": 0})

    with pytest.raises(RuntimeError, match="a of seed 2 returned before its result was saved"):
        Forgetful(tmp_path).run([2], ["a"])
    with pytest.raises(DataError, match="holds no finished result"):
        Forgetful(tmp_path).results([2], ["a"])
