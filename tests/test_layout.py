"""The shape of the code: imports run one way, private names stay in their file, and files are short."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Top to bottom: a module imports from those below it only.
LAYERS = (
    "integrations",
    *("testing", "certificate", "restore", "bounds", "outputs"),
    *("optimizer", "move", "promise", "edge", "settle", "restoring", "room", "agreement", "budget"),
    *("automatic", "step", "step_info", "gradients", "saving", "checks", "state"),
    *("path", "secondary", "geometry", "metric", "anchors"),
    *("parameters", "flat", "shards", "solver", "mean", "ranks", "optional"),
)
# The packages of recipes that each of them may import from.
RECIPES: dict[str, set[str]] = {
    "common": set(),
    "continual": {"common"},
    "new_task": {"common", "continual"},
    "split_tasks": {"common", "continual"},
    "sparsify": {"common"},
    "diversity": {"common"},
    "hotfix": {"common"},
    "update": {"common"},
    "finetune": {"common"},
    "quantize": {"common"},
    "spectrum": {"common", "finetune"},  # its pretrained encoder with LoRA, and texts
}
# Each is imported by its own module of fipoptim.integrations and by no other.
FRAMEWORKS = {"accelerate", "avalanche", "lightning", "peft", "transformers"}
LONGEST = 400  # lines of a file, docstrings included


def modules(package: str) -> dict[str, ast.Module]:
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text("utf-8"))
        for file in sorted((ROOT / package).rglob("*.py"))
    }


def imports(tree: ast.Module, package: str) -> dict[str, list[str]]:
    """Returns the modules of the package that a module imports anywhere, and the names that it takes from each."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] == package:
                found.setdefault(node.module, []).extend(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package:
                    found.setdefault(alias.name, [])
    return found


def imported_modules(tree: ast.Module, package: str) -> set[str]:
    """Returns the names in a module that refer to whole modules of the package."""
    return {
        name
        for target, names in imports(tree, package).items()
        for name in names
        if ROOT.joinpath(*target.split("."), f"{name}.py").exists()
    }


def test_imports_of_the_library_run_down_the_layers() -> None:
    for name, tree in modules("fipoptim").items():
        if name == "fipoptim.__init__":
            continue
        own = name.split(".")[1]
        for target, names in imports(tree, "fipoptim").items():
            parts = target.split(".")
            for layer in [parts[1]] if len(parts) > 1 else names:
                assert layer == own or LAYERS.index(own) < LAYERS.index(layer), (name, target)


def test_a_framework_is_imported_only_when_its_integration_is_asked_for() -> None:
    for name, tree in modules("fipoptim").items():
        for framework in FRAMEWORKS:
            if name != f"fipoptim.integrations.{framework}":
                assert not imports(tree, framework), name


def test_a_recipe_imports_from_no_other_but_those_named() -> None:
    packages = {folder.parent.name for folder in (ROOT / "recipes").glob("*/__init__.py")}
    assert packages == set(RECIPES)
    for name, tree in modules("recipes").items():
        if name == "recipes.__init__":
            continue
        own = name.split(".")[1]
        for target, names in imports(tree, "recipes").items():
            parts = target.split(".")
            for package in [parts[1]] if len(parts) > 1 else names:
                assert package in {own, *RECIPES[own]}, (name, target)


@pytest.mark.parametrize("package", ["fipoptim", "recipes"])
def test_no_module_imports_itself_through_others(package: str) -> None:
    graph = {
        name.removesuffix(".__init__"): {
            f"{target}.{n}" if n in imported_modules(tree, package) else target
            for target, names in imports(tree, package).items()
            for n in names or [""]
        }
        for name, tree in modules(package).items()
    }
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        assert name not in way, " -> ".join([*way, name])
        if name not in done:
            for target in graph.get(name, []):
                visit(target, [*way, name])
            done.add(name)

    for name in graph:
        if name != package:  # the public page imports everything
            visit(name, [])


@pytest.mark.parametrize("package", ["fipoptim", "recipes"])
def test_private_names_stay_in_their_file(package: str) -> None:
    for name, tree in modules(package).items():
        for target, names in imports(tree, package).items():
            assert not [n for n in names if n.startswith("_")], (name, target, names)
        used = {
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.attr.startswith("_")
            and node.value.id in imported_modules(tree, package)
        }
        assert not used, (name, used)


@pytest.mark.parametrize("package", ["fipoptim", "recipes"])
def test_files_are_short(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        lines = len(file.read_text("utf-8").splitlines())
        assert lines <= LONGEST, f"{file.relative_to(ROOT)} has {lines} lines"
