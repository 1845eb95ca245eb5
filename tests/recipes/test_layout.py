"""The shape of recipes/: imports run one way, private names stay in their files, no file is long."""

import ast
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.rglob("*.py"))
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


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_run_one_way(file):
    own = file.relative_to(RECIPES).parts[0]
    for module, name in imports(file):
        package = [*module.split("."), name][1]
        assert package == own or package in ALLOWED[own], f"{module} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_private_name_is_used_in_another_file(file):
    modules = set()
    for module, name in imports(file):
        assert not name.startswith("_"), f"{name} of {module}"
        if (RECIPES.parent.joinpath(*module.split("."), name).with_suffix(".py")).exists():
            modules.add(name)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            of_a_module = isinstance(node.value, ast.Name) and node.value.id in modules
            assert not of_a_module, f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_file_is_long(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("name", sorted(set(ALLOWED) - {"common", "continual"}))
def test_every_recipe_runs_as_a_module(name):
    assert (RECIPES / name / "__main__.py").exists()
