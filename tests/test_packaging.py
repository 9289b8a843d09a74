"""What ships: every package of the tree, the type marker, and the extras that are promised."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import c4buffer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


@pytest.fixture
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_of_the_tree_is_listed(pyproject: dict[str, Any]) -> None:
    tree = {"c4buffer": "c4buffer", "integrations": "c4buffer.integrations"}
    found = {
        ".".join([name, *path.parent.relative_to(ROOT / folder).parts])
        for folder, name in tree.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(pyproject["tool"]["setuptools"]["packages"]) == found
    assert (ROOT / "c4buffer" / "py.typed").exists()
    assert pyproject["tool"]["setuptools"]["package-data"] == {"c4buffer": ["py.typed"]}


def test_dependencies_and_extras_are_those_promised(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    assert [name.split(">")[0] for name in project["dependencies"]] == ["torch", "numpy", "safetensors"]
    extras = set(project["optional-dependencies"])
    assert {"d3rlpy", "sb3", "faiss", "gpu", "sklearn", "plots", "data", "torchrl", "all"} <= extras
    assert not any("gpu" in name for name in project["optional-dependencies"]["all"])  # two wheels own `faiss`


def test_the_version_is_the_same_everywhere(pyproject: dict[str, Any]) -> None:
    assert c4buffer.__version__ == pyproject["project"]["version"]
    assert f"version: {c4buffer.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {c4buffer.__version__}" in (ROOT / "CHANGELOG.md").read_text()
