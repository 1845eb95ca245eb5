"""The shape of recipes/: imports run one way, private names stay in their files, no file is long."""

import ast
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(f for f in RECIPES.rglob("*.py") if f.parent != RECIPES)
# What the files of each package may import, beside the package itself.
ALLOWED = {
    "common": set(),
    "continual": {"common"},
    "new_task": {"common", "continual"},
    "split_tasks": {"common", "continual"},
    "sparsify": {"common"},
    "diversity": {"common"},
}


def imports(file):
    """Pairs of a module of recipes that a file imports from, and the name that it imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "recipes":
            for alias in node.names:
                yield node.module, alias.name
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.split(".")[0] != "recipes", "from recipes.package import module"


def name_of(file):
    return str(file.relative_to(RECIPES))


def test_every_package_is_known():
    packages = {folder.name for folder in RECIPES.iterdir() if (folder / "__init__.py").exists()}
    assert packages == set(ALLOWED)


def test_imports_run_one_way():
    wrong = []
    for file in FILES:
        own = file.relative_to(RECIPES).parts[0]
        for module, name in imports(file):
            package = [*module.split("."), name][1]
            if package != own and package not in ALLOWED[own]:
                wrong.append(f"{name_of(file)}: {module} imports {name}")
    assert wrong == []


def test_no_private_name_is_used_in_another_file():
    wrong = []
    for file in FILES:
        modules = set()
        for module, name in imports(file):
            if name.startswith("_"):
                wrong.append(f"{name_of(file)}: {name} of {module}")
            if RECIPES.parent.joinpath(*module.split("."), f"{name}.py").exists():
                modules.add(name)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            private = isinstance(node, ast.Attribute) and node.attr.startswith("_")
            if private and isinstance(node.value, ast.Name) and node.value.id in modules:
                wrong.append(f"{name_of(file)}: {node.value.id}.{node.attr}")
    assert wrong == []


def test_no_file_is_long():
    lengths = {name_of(f): len(f.read_text(encoding="utf-8").splitlines()) for f in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


@pytest.mark.parametrize("name", sorted(set(ALLOWED) - {"common", "continual"}))
def test_every_recipe_runs_as_a_module(name):
    assert (RECIPES / name / "__main__.py").exists()
