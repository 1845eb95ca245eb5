"""One of the processes of ``test_finetune_processes``, which run ``recipes.finetune`` with several arguments."""

import json
import sys
from pathlib import Path

from finetune_cases import SHORT, arguments

from recipes.common import processes
from recipes.finetune.command import main

# Batches, anchors and check texts that two processes cannot share evenly.
UNEVEN = ["--batch-size", "7", "--anchor-batch", "5", "--check", "9"]
RUNS = {
    "texts": [*UNEVEN, "--adapter", "none", "--eps", "1", "--beta", "30", "--max-drift", "0.002"],
    "language": [*UNEVEN, "--adapter", "none", "--method", "fip", "distillation", "plain"],
}
MODELS = {"texts": "model", "language": "gpt2"}
BY_TIME = ["--steps", "none", "--seconds", "0.3", "--method", "fip", "plain"]
REFUSED = {
    "--batch-size": [*RUNS["texts"], "--batch-size", "1"],
    "--device": [*RUNS["texts"], "--device", "cuda:0"],
    "--anchors": [*RUNS["texts"], "--anchors", "5000"],
    "--resume": [*RUNS["texts"], "--resume", "--rank", "3"],
}


def given(tiny, out, name):
    """The arguments of a run."""
    return [*SHORT, *arguments(tiny, out / name), "--model", str(tiny / MODELS[name])]


def status(argv):
    """The exit status of the recipe."""
    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code


def all_runs(tiny, out):
    """The exit status of each run, by name."""
    found = {name: status([*given(tiny, out, name), *more]) for name, more in RUNS.items()}
    for name, more in REFUSED.items():
        found[name] = status([*given(tiny, out, "texts"), *more])
    if processes.ranks().rank == 0:
        (out / "texts" / "seed-0" / "plain.json").unlink()
    found["resumed"] = status([*given(tiny, out, "texts"), *RUNS["texts"], "--resume"])
    found["by time"] = status([*SHORT, *arguments(tiny, out / "time"), *BY_TIME])
    return found


if __name__ == "__main__":
    with processes.joined():
        folder = Path(sys.argv[2])
        ended = all_runs(Path(sys.argv[1]), folder)
        (folder / f"rank-{processes.ranks().rank}.json").write_text(json.dumps(ended))
