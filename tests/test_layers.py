"""The architecture, read from the imports: arrows point down, siblings never import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHELVES = [  # from the ground up; within a layer of the architecture too, imports go one way only
    (0, {"view", "noise"}),
    (0, {"loss"}),
    (1, {"source", "attention"}),
    (1, {"denoiser", "drift"}),
    (1, {"decode"}),
    (2, {"module", "data", "strategies", "checkpoint", "loggers"}),
    (3, {"recipes", "callbacks"}),
    (4, {"catalog", "runs"}),
    (4, {"errors"}),
    (4, {"training"}),
    (4, {"picture", "summary"}),
    (4, {"cli"}),
]
LAYERS = {name: layer for layer, names in SHELVES for name in names}
SHELF = {name: shelf for shelf, (_, names) in enumerate(SHELVES) for name in names}
HEAVY = {"torch", "lightning", "transformers", "datasets", "jsonargparse", "matplotlib", "numpy", "rich"}
FREE_OF_TORCH = {"cli", "catalog", "errors", "runs"}  # as far as their top level goes
FILES = sorted(
    path
    for folder in ("dlm_lightning", "recipes", "callbacks")
    for path in (ROOT / folder).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)
)


def imports(path: Path, top_level: bool = False) -> set[str]:
    """The full names that a file imports."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(name: str) -> str | None:
    """The part of the house that a full name belongs to, None for other packages and the package itself."""
    words = name.split(".")
    if words[0] in ("recipes", "callbacks", "configs"):
        raise AssertionError(f"{name} is imported by its bare name")
    return words[1] if words[0] == "dlm_lightning" and words[1] in LAYERS else None


def home(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).parts
    return folder if folder != "dlm_lightning" else rest[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = home(path)
    if own == "__init__":
        assert not {part(name) for name in imports(path)} - {None}
        return
    for name in imports(path):
        other = part(name)
        if other is None or other == own:
            continue
        assert SHELF[other] < SHELF[own], f"{own} imports {other}, which stands beside or above it"


def test_lightning_starts_at_layer_two_and_transformers_at_one():
    for path in FILES:
        layer = LAYERS.get(home(path))
        packages = {name.split(".")[0] for name in imports(path)}
        if layer in (0, 1):
            assert not packages & {"lightning", "pytorch_lightning"}, path
        if layer == 0:
            assert not packages & {"transformers", "datasets"}, path


def test_the_command_line_imports_nothing_heavy_at_its_top_level():
    for path in FILES:
        if home(path) in FREE_OF_TORCH | {"__init__"} and path.parent.name == "dlm_lightning":
            assert not {name.split(".")[0] for name in imports(path, top_level=True)} & HEAVY, path


@pytest.mark.parametrize("name", ["recipes", "callbacks", "configs"])
def test_a_bare_import_of_a_mapped_package_is_refused(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ImportError, match=f"import dlm_lightning.{name}"):
        __import__(name)
