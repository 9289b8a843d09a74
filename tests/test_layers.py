"""The tree: imports go down its layers only, importing is light, and every public name is explained."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import c4buffer

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "c4buffer"
INTEGRATIONS = ROOT / "integrations"
HOSTS = {"d3rlpy": "d3rlpy", "sb3": "stable_baselines3", "torchrl": "torchrl"}
HEAVY = {
    *HOSTS.values(),
    "faiss",
    "gym",
    "gymnasium",
    "h5py",
    "matplotlib",
    "minari",
    "safetensors",
    "scipy",
    "sklearn",
}
LAYERS = {
    "_checks": 0,
    "observations": 0,
    "fields": 0,
    "files": 0,
    "layout": 0,
    "collective": 0,
    "memory": 0,
    "scaling": 0,
    "inference": 0,
    "trajectories": 0,
    "faiss_kmeans": 0,
    "kmeans": 0,
    "networks": 0,
    "products": 0,
    "prefetch": 1,
    "transitions": 0,
    "critics": 1,
    "gradients": 1,
    "stacking": 1,
    "expectation": 1,
    "partition": 1,
    "dissolved": 1,
    "storage": 1,
    "mixture": 1,
    "losses.value_ensemble": 1,
    "losses.temperature": 1,
    "losses.likelihood": 1,
    "losses.covariance": 2,
    "clustering": 2,
    "embedding": 2,
    "reduction": 2,
    "drawing": 2,
    "sampling": 2,
    "windows": 2,
    "refresh": 2,
    "steps": 1,
    "clustered_rows": 2,
    "backends": 3,
    "buffer": 3,
    "buffer_state": 3,
    "checkpoint": 0,
    "diagnostics": 4,
    "datasets": 4,
    "plots": 5,
    "report": 5,
    "__main__": 5,
    "integrations": 6,
}


def modules() -> dict[str, Path]:
    """Every module of the package by its name below `c4buffer`; the packages' own files are empty but for names."""
    files = {path: path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    return {".".join(short.with_suffix("").parts): path for path, short in files.items() if short.name != "__init__.py"}


def layer_of(module: str) -> int:
    """Of the module itself, or of the package that it is in."""
    parts = module.split(".")
    known = [
        LAYERS[name] for name in (".".join(parts[:length]) for length in range(len(parts), 0, -1)) if name in LAYERS
    ]
    assert known, f"{module} has no layer"
    return known[0]


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below a node that is there when the code runs."""
    for child in ast.iter_child_nodes(node):
        if not only_for_types(child):
            yield child
            yield from statements(child)


def imports(path: Path, package: list[str]) -> set[str]:
    """Full names of what a module imports; `package` is the one that its relative imports start from."""
    found: set[str] = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.update([name] if node.module else [f"{name}.{alias.name}" for alias in node.names])
    return found


def internal(module: str, path: Path) -> set[str]:
    """What a module of c4buffer imports from c4buffer."""
    found = imports(path, ["c4buffer", *module.split(".")[:-1]])
    return {name.removeprefix("c4buffer.") for name in found if name.split(".")[0] == "c4buffer"}


@pytest.mark.parametrize("module", modules())
def test_imports_go_down_the_layers(module: str) -> None:
    for name in internal(module, modules()[module]):
        assert name != "c4buffer", f"{module} imports the package that imports it"
        assert layer_of(name) <= layer_of(module), f"{module} imports {name}, which stands above it"


def test_no_two_modules_import_each_other() -> None:
    below = {module: internal(module, path) for module, path in modules().items()}
    while below:
        ready = [module for module, needs in below.items() if not needs & below.keys()]
        assert ready, f"a circle among {sorted(below)}"
        for module in ready:
            del below[module]


def test_imports_are_read_as_python_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import a.b\nfrom . import near\nfrom .near import x\nfrom ..far import y\nfrom c4buffer.whole import z\n"
        "def f():\n    import late\nif TYPE_CHECKING:\n    from .above import Type\n"
    )
    found = {"a.b", "c4buffer.losses.near", "c4buffer.far", "c4buffer.whole", "late"}
    assert imports(path, ["c4buffer", "losses"]) == found


def integration_files() -> list[tuple[str, Path]]:
    return [(path.relative_to(INTEGRATIONS).parts[0], path) for path in INTEGRATIONS.glob("*/**/*.py")]


@pytest.mark.parametrize(("host", "path"), integration_files(), ids=lambda value: getattr(value, "stem", value))
def test_an_integration_imports_no_other(host: str, path: Path) -> None:
    below = list(path.parent.relative_to(INTEGRATIONS).parts)
    found = imports(path, ["c4buffer", "integrations", *below])
    others = {name for name in found if name.split(".")[:2] == ["c4buffer", "integrations"]}
    assert all(name.split(".")[2:3] == [host] for name in others), others
    foreign = {module for folder, module in HOSTS.items() if folder != host}
    assert not {name.split(".")[0] for name in found} & foreign


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, c4buffer; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert {"c4buffer", "torch"} <= loaded
    assert not loaded & HEAVY


def test_every_module_is_in_one_of_the_layers() -> None:
    assert {module for module in modules() if not 0 <= layer_of(module) <= 5} == set()


@pytest.mark.parametrize("name", c4buffer.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    public = getattr(c4buffer, name)
    assert (public.__doc__ or "").strip()
    # A dataclass without one is given its signature.
    assert not public.__doc__.startswith(f"{name}(")


def test_public_names_are_sorted_and_all_that_is_imported() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(imported) == sorted(c4buffer.__all__) == c4buffer.__all__


@pytest.mark.parametrize(
    "path", [*modules().values(), *(path for _, path in integration_files())], ids=lambda path: path.stem
)
def test_every_module_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
