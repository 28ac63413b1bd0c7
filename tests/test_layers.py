"""The architecture, read from the imports: arrows point down, siblings never import each other."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHELVES = [  # from the ground up; within a layer of the architecture too, imports go one way only
    (0, {"transfer", "shards"}),
    (0, {"view", "noise"}),
    (0, {"loss", "schedule"}),
    (0, {"tally"}),
    (1, {"layouts", "bfloat16", "flops"}),
    (1, {"liger"}),
    (1, {"source", "mask_token", "attention", "readout", "lora", "cache"}),
    (1, {"denoiser", "drift", "representation", "compilation"}),
    (1, {"decode", "sight", "likelihood", "pattern_flops"}),
    (2, {"optimizer", "precision", "interruption", "manifest"}),
    (2, {"conversion", "checkpoint", "peak_flops"}),
    (2, {"nonfinite", "saving"}),
    (2, {"module", "data", "strategies", "loggers"}),
    (2, {"gradient_noise"}),
    (3, {"recipes", "callbacks"}),
    (4, {"catalog", "runs"}),
    (4, {"errors", "step_zero"}),
    (4, {"parsing"}),
    (4, {"reopening"}),
    (4, {"training"}),
    (4, {"allocator", "consolidate", "drift_between"}),
    (4, {"rehearsal"}),
    (4, {"picture", "summary", "plan", "probe", "importing", "replay", "generate", "tasks"}),
    (4, {"evaluation", "harness", "bench"}),
    (4, {"report"}),
    (4, {"export"}),
    (4, {"comparison"}),
    (4, {"commands"}),
    (4, {"cli"}),
]
LAYERS = {name: layer for layer, names in SHELVES for name in names}
SHELF = {name: shelf for shelf, (_, names) in enumerate(SHELVES) for name in names}
WITHIN = {  # what the files of a folder may import of it; of the folders that are not named here, nothing
    "attention": {
        "__init__": {"dense", "flash", "flex", "split"},
        "flash": {"dense"},
        "parts": {"bounds"},
        "split": {"dense", "parts"},
        "flex": {"bounds"},
    },
    "decode": {
        "reuse": {"canvas"},
        "selector": {"canvas"},
        "stopper": {"canvas"},
        "plan": {"reuse", "sampling", "scorer", "selector", "stopper"},
        "decoder": {"canvas", "plan", "scorer"},
    },
    "bench": {
        "__init__": {"arms", "needs", "record", "show", "timing"},
        "arms": {"baselines"},
        "needs": {"arms"},
        "record": {"arms", "timing"},
        "show": {"arms", "record", "timing"},
    },
    "export": {
        "__init__": {"block_diffusion", "causal", "published", "serving"},
        "published": {"block_diffusion", "serving"},
        "block_diffusion": {"card"},
        "card": {"serving"},
    },
    "comparison": {"__init__": {"arms", "processes", "request"}},
    "harness": {"__init__": {"model"}},
    "commands": {
        "__init__": {"measures", "models", "recipes", "runs"},
        **{name: {"arguments"} for name in ("measures", "models", "recipes", "runs")},
    },
    "report": {
        "__init__": {"content", "figures", "tables"},
        "figures": {"content"},
        "pairs": {"content"},
        "tables": {"content", "pairs"},
    },
    "data": {
        "stream": {"rows"},
        "report": {"rows"},
        "records": {"files"},
        "token_data": {"files", "report", "rows", "stream", "tokenizer"},
        "text_files": {"files", "records", "token_data"},
        "hub_text": {"files", "hub", "records", "token_data"},
        "answers": {"rows", "token_data"},
        "exact_answers": {"answers", "token_data"},
        "conversations": {"records"},
        "chat": {"answers", "conversations", "files", "hub", "records", "token_data"},
        "mixture": {"report", "rows", "stream", "token_data"},
    },
}
GROUND = {*sys.stdlib_module_names, "torch", "numpy"}  # all that layer 0 stands on
HEAVY = {"torch", "lightning", "transformers", "datasets", "jsonargparse", "matplotlib", "numpy", "rich"}
# as far as their top level goes
FREE_OF_TORCH = {"cli", "commands", "catalog", "errors", "interruption", "manifest", "runs"}
FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("dlm_lightning", "recipes", "callbacks")
    for path in (ROOT / folder).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)
)


def imports(source: str, top_level: bool = False) -> set[str]:
    """The full names that a source imports."""
    tree = ast.parse(source)
    names = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def home(path: Path) -> tuple[str, str]:
    """The part of the house that a file belongs to, and the file's own name in it: `("data", "rows")`."""
    folder, *rest = path.with_suffix("").parts
    words = rest if folder == "dlm_lightning" else [folder, *rest]
    return words[0], ".".join(words[1:]) or "__init__"


def violations(path: Path, source: str) -> list[str]:
    """What a file of the package, by its path from the root, does against the architecture."""
    own, file = home(path)
    if own != "__init__" and own not in LAYERS:
        return [f"{path} stands in no layer"]
    found = []
    for name in sorted(imports(source)):
        package, *words = name.split(".")
        if not package:
            found.append(f"relative import of {name}")
        elif package in ("recipes", "callbacks", "configs"):
            found.append(f"{name} is imported by its bare name")
        elif package != "dlm_lightning":
            if LAYERS.get(own) == 0 and package not in GROUND:
                found.append(f"{own}, of layer 0, imports {package}")
            elif LAYERS.get(own) == 1 and package in ("lightning", "pytorch_lightning"):
                found.append(f"{own}, of layer 1, imports {package}")
        elif not words or words == ["__version__"]:
            continue
        elif words[0] not in LAYERS:
            found.append(f"{name} stands in no layer")
        elif words[0] != own:
            if own == "__init__" or SHELF[words[0]] >= SHELF[own]:
                found.append(f"{own} imports {words[0]}, which stands beside or above it")
        elif (words[1:] or ["__init__"])[0] not in WITHIN.get(own, {}).get(file, set()):
            found.append(f"{own}.{file} imports its sibling {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path):
    assert violations(path, (ROOT / path).read_text()) == []


def test_every_layer_is_inhabited():
    assert {home(path)[0] for path in FILES} - {"__init__"} == set(LAYERS)


MADE_UP = [
    ("recipes/mine.py", "from dlm_lightning.recipes.block_causal import BlockCausal", "sibling"),
    ("recipes/mine.py", "import dlm_lightning.recipes.block_causal", "sibling"),
    ("recipes/mine.py", "from dlm_lightning.recipes import block_causal", "sibling"),
    ("recipes/mine.py", "def f():\n    from dlm_lightning.recipes import block_causal", "sibling"),
    ("recipes/mine.py", "from recipes.block_causal import BlockCausal", "bare name"),
    ("recipes/mine.py", "from . import block_causal", "relative"),
    ("recipes/mine.py", "from dlm_lightning.callbacks.samples import Samples", "beside or above"),
    ("recipes/mine.py", "from dlm_lightning.training import fit", "beside or above"),
    ("callbacks/mine.py", "from dlm_lightning.callbacks.weight_drift import last", "sibling"),
    ("callbacks/mine.py", "from dlm_lightning.recipes.block_causal import BlockCausal", "beside or above"),
    ("dlm_lightning/data/mine.py", "from dlm_lightning.data.text_files import TextFiles", "sibling"),
    ("dlm_lightning/data/rows.py", "from dlm_lightning.data.stream import collate", "sibling"),
    ("dlm_lightning/data/text_files.py", "from dlm_lightning.data.exact_answers import ExactAnswers", "sibling"),
    ("dlm_lightning/data/mine.py", "from dlm_lightning.module import Recipe", "beside or above"),
    ("dlm_lightning/attention/dense.py", "from dlm_lightning.attention import flash", "sibling"),
    ("dlm_lightning/mine.py", "", "no layer"),
    ("dlm_lightning/mine/thing.py", "", "no layer"),
    ("dlm_lightning/summary.py", "from dlm_lightning.mine import thing", "no layer"),
    ("dlm_lightning/summary.py", "from dlm_lightning import mine", "no layer"),
    ("dlm_lightning/__init__.py", "from dlm_lightning.module import Recipe", "beside or above"),
    ("dlm_lightning/view.py", "from dlm_lightning.noise import Noise", "beside or above"),
    ("dlm_lightning/view.py", "from dlm_lightning.mine import thing", "no layer"),
    ("dlm_lightning/view.py", "import lightning as L", "layer 0"),
    ("dlm_lightning/noise.py", "from transformers import AutoConfig", "layer 0"),
    ("dlm_lightning/loss.py", "import torchmetrics", "layer 0"),
    ("dlm_lightning/loss.py", "def f():\n    import einops", "layer 0"),
    ("dlm_lightning/drift.py", "import lightning.pytorch", "layer 1"),
]


@pytest.mark.parametrize("path, source, message", MADE_UP)
def test_the_rule_rejects(path, source, message):
    [found] = violations(Path(path), source)
    assert message in found


@pytest.mark.parametrize(
    "path, source",
    [
        (
            "recipes/mine.py",
            "from dlm_lightning.module import Recipe\nfrom dlm_lightning.view import Pattern",
        ),
        ("callbacks/mine.py", "import lightning\nfrom dlm_lightning.decode.decoder import decode"),
        ("dlm_lightning/data/text_files.py", "from dlm_lightning.data.token_data import TokenData"),
        ("dlm_lightning/loss.py", "import math, torch.nn, numpy as np\nfrom dlm_lightning.view import View"),
        ("dlm_lightning/cli.py", "from dlm_lightning import __version__, catalog"),
    ],
)
def test_the_rule_allows(path, source):
    assert violations(Path(path), source) == []


def test_the_command_line_imports_nothing_heavy_at_its_top_level():
    for path in FILES:
        if home(path)[0] in FREE_OF_TORCH | {"__init__"}:
            top_level = imports((ROOT / path).read_text(), top_level=True)
            assert not {name.split(".")[0] for name in top_level} & HEAVY, path


@pytest.mark.parametrize("name", ["recipes", "callbacks", "configs"])
def test_a_bare_import_of_a_mapped_package_is_refused(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ImportError, match=f"import dlm_lightning.{name}"):
        __import__(name)
