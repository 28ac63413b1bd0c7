"""Every YAML on disk: it parses, instantiates, carries its help, and resolves to what the golden dump says."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
import yaml

from dlm_lightning import attention, catalog
from dlm_lightning.source import build, build_config
from dlm_lightning.training import PLACEHOLDER, parse

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FRAGMENTS = sorted((ROOT / "configs").rglob("*.yaml"))
SIZES = {  # of the published config.json files, which are not reachable in tests
    "efficient_dlm_qwen3_4b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "head_dim": 128,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "fast_dllm_v2_qwen2_5_1_5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
PARAMETERS = {"efficient_dlm_qwen3_4b": 4.02e9, "fast_dllm_v2_qwen2_5_1_5b": 1.54e9}


def on_this_machine(path: Path) -> list[str]:
    """Overrides that let a recipe for GPUs instantiate where there is none."""
    return ["trainer.accelerator=cpu", "trainer.devices=1"] if path.stem in SIZES else []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_instantiates(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = parse(catalog.compose(path), on_this_machine(path), PLACEHOLDER)
    assert cli.trainer.max_steps > 0
    stem = "".join(word.title() for word in path.stem.split("_"))
    if path.stem not in SIZES:
        assert type(cli.model).__name__ == stem, "a recipe's YAML and its class share a stem"
        assert type(cli.model).__module__ == f"dlm_lightning.recipes.{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_resolves_to_its_golden_dump(path, tmp_path, monkeypatch):
    """`DLM_GOLDEN=1 pytest tests/test_shipped_recipes.py` writes the dumps anew."""
    monkeypatch.chdir(tmp_path)
    cli = parse(catalog.compose(path), on_this_machine(path), PLACEHOLDER)
    text = cli.parser.dump(cli.config, skip_none=False)
    golden = GOLDEN / path.name
    if os.environ.get("DLM_GOLDEN") == "1":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), "a default moved; if that is meant, write the dumps anew"


@pytest.mark.parametrize("path", RECIPES + FRAGMENTS, ids=lambda path: path.stem)
def test_it_says_what_it_is(path):
    assert path.read_text().startswith("# "), "the first line is the description that `dlm list` shows"
    yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", RECIPES + FRAGMENTS, ids=lambda path: path.stem)
def test_every_key_has_help(path):
    """A comment beside each value; classes have docstrings, and a source's `config` has transformers' own keys."""
    text = re.sub(r"(?m)^    config:.*\n(      .*\n)+", "", path.read_text())
    for line in text.splitlines():
        if re.match(r"\s+(- )?\w+: \S", line) and "class_path:" not in line:
            assert " # " in line, line


@pytest.mark.parametrize("name", SIZES)
def test_real_scale_recipes_instantiate_on_the_meta_device(name):
    config = build_config(SIZES[name])
    network = build(config, None, attention.NAME, meta=True)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert all(parameter.device == torch.device("meta") for parameter in network.parameters())
    assert parameters == pytest.approx(PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize(("name", "tokens"), [("efficient_dlm_qwen3_4b", 25e9), ("fast_dllm_v2_qwen2_5_1_5b", 3.15e9)])
def test_real_scale_budgets_are_the_papers(name, tokens):
    config = catalog.compose(ROOT / "recipes" / f"{name}.yaml")
    trainer, data = config["trainer"], config["data"]["init_args"]
    rows = data["batch_size"] * trainer["devices"] * trainer["accumulate_grad_batches"]
    assert trainer["max_steps"] * rows * data["row_length"] == pytest.approx(tokens, rel=0.01)
