"""The documentation builds, its examples run, its links and commands exist, and its figures are those of the files."""

from __future__ import annotations

import copy
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fipoptim.geometry import GEOMETRIES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts),
]
FENCED = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def examples(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    built = subprocess.run(
        [*command, "-d", tmp_path / "doctrees", ROOT / "docs", tmp_path / "html"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "html" / "index.html").exists()


@pytest.mark.parametrize("page", [p for p in PAGES if examples(p)], ids=named)
def test_the_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    torch.manual_seed(0)
    names = readers_own_names() if page == README else {}
    with mock.patch.dict(GEOMETRIES):  # a geometry that an example registers is gone after it
        for number, code in enumerate(examples(page), start=1):
            exec(compile(code, f"{named(page)}, example {number}", "exec"), names)


@pytest.mark.parametrize("program", sorted((ROOT / "docs" / "examples").glob("*.py")), ids=named)
def test_the_programs_run_on_two_processes(program: Path) -> None:
    """The docstring of a program has its command."""
    torchrun = "torchrun --nproc-per-node 2"
    assert f"{torchrun} {named(program)}" in program.read_text(encoding="utf-8")
    ran = subprocess.run(
        # Alone on a port of its own, as several may run at once.
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            *torchrun.split()[1:],
            program,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "on 2 ranks" in ran.stdout


def readers_own_names() -> dict[str, Any]:
    """Returns a network and its data, which a reader of the README has already."""
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    return {
        "F": F,
        "model": model,
        "shipped": copy.deepcopy(model),
        "held_out": torch.randn(50, 4),
        "labels": torch.randint(3, (50,)),
        "old_inputs": torch.randn(20, 4),
        "loader": [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(6)],
    }


def slug(heading: str) -> str:
    """Returns the anchor that GitHub and MyST give to a heading."""
    words = re.sub(r"[`*]|\[|\]\(.*?\)", "", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_and_image_exists(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    missing = []
    for target in re.findall(r"\]\(<?([^)\s>]+)>?\)", text):
        if re.match(r"[a-z]+:", target):
            continue  # links to the web are not checked
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            missing.append(target)
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            if anchor not in map(slug, headings):
                missing.append(target)
    assert not missing, f"{named(page)} links to what is not there: {missing}"


def test_every_result_is_linked() -> None:
    """Every result file is mentioned on some page; others should be deleted."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = {file.name for file in (ROOT / "benchmarks" / "results").iterdir()}
    assert not {name for name in files if name not in text}


def commands() -> dict[str, set[str]]:
    """The modules that the pages run by ``python -m``, and the options that they give each."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for module, rest in re.findall(r"python -m ((?:recipes|benchmarks)[\w.]*)([^`\n]*)", text):
            if not module.endswith(".NAME"):
                found.setdefault(module, set()).update(re.findall(r"--[\w-]+", rest))
    return found


@pytest.mark.parametrize("module", sorted(commands()))
def test_every_command_and_option_exists(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with warnings.catch_warnings(), pytest.raises(SystemExit, match="0"):
        warnings.simplefilter("ignore", RuntimeWarning)  # the module was imported before
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert commands()[module] <= known


def test_the_readme_is_short() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 120


# The figures of the README's table: file, place and name of the figure, decimals, and name of its deviation.
MEAN, WITHIN, TRANSFER = "mean_after", "within_task", "transfer_mean_0.06"
FIGURES = [
    ("new_task_mnist_fashion", ("metrics",), MEAN, 2),
    ("new_task_mnist_fashion", ("metrics", "baselines", "distillation"), MEAN, 2),
    ("split_tasks_cifar100_short_less_momentum", ("metrics",), WITHIN, 2),
    (
        "split_tasks_cifar100_short_less_momentum",
        ("metrics", "baselines", "distillation"),
        WITHIN,
        2,
    ),
    ("sparsify_lenet_one_path", ("metrics",), "accuracy", 2),
    ("sparsify_lenet_one", ("metrics", "baselines", "gradual-distillation"), "accuracy", 2),
    ("diversity_fashion", ("metrics", "ensembles", "withstand"), TRANSFER, 1),
    ("diversity_fashion", ("metrics", "ensembles", "adversarial"), TRANSFER, 1),
]


@pytest.mark.parametrize(("file", "keys", "name", "digits"), FIGURES)
def test_the_readme_says_what_was_measured(
    file: str, keys: tuple[str, ...], name: str, digits: int
) -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())
    for key in keys:
        found = found[key]
    deviation = found["deviations"][name] if "deviations" in found else found[f"{name}_deviation"]
    assert f"{found[name]:.{digits}f} ± {deviation:.{digits}f}" in README.read_text("utf-8")
