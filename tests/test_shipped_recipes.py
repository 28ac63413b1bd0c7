"""Every YAML on disk: it parses, instantiates, carries its help, and resolves to what the golden dump says."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from dlm_lightning import attention, catalog
from dlm_lightning.source import build_config
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
TOKENS = {"efficient_dlm_qwen3_4b": 151669, "fast_dllm_v2_qwen2_5_1_5b": 151665}  # of the published tokenizers


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
    """A comment beside each value; classes have docstrings."""
    for line in path.read_text().splitlines():
        if re.match(r"\s+(- )?\w+: \S", line) and "class_path:" not in line:
            assert " # " in line, line


class Tokens(dict):
    """A tokenizer, as far as the number of its tokens goes."""

    def get_vocab(self) -> Tokens:
        return self


@pytest.mark.parametrize("name", SIZES)
def test_real_scale_recipes_instantiate_on_the_meta_device(name, tmp_path, monkeypatch):
    """The YAML's own recipe and values, as a sharding strategy would have it built; only the hub's files stand in."""
    monkeypatch.chdir(tmp_path)
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe = parse(catalog.compose(path), on_this_machine(path), PLACEHOLDER).model
    tokens = Tokens((str(n), n) for n in range(TOKENS[name]))
    recipe.__dict__["source"] = SimpleNamespace(config=build_config(SIZES[name]), tokenizer=lambda: tokens)
    recipe._trainer = SimpleNamespace(strategy=SimpleNamespace(shard=lambda denoiser, source: None))
    recipe.configure_model()
    network = recipe.denoiser.network
    assert all(parameter.device == torch.device("meta") for parameter in network.parameters())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == pytest.approx(PARAMETERS[name], rel=0.01)
    assert network.config.vocab_size == SIZES[name]["vocab_size"], "the mask token takes a free row"
    assert recipe.denoiser.mask_id == TOKENS[name]
    assert network.config._attn_implementation == attention.NAME
    written = catalog.compose(path)["model"]
    assert f"{type(recipe).__module__}.{type(recipe).__name__}" == written["class_path"]
    for key, value in written["init_args"].items():
        if key in ("block_size", "context", "context_rank"):
            assert getattr(recipe.pattern, key) == value, key
        elif key == "noise":
            assert value.items() <= asdict(recipe.noise).items()
        elif key in ("shift", "first_token"):
            assert getattr(recipe.denoiser, key) == value, key
        else:
            assert getattr(recipe, "source_name" if key == "source" else key) == value, key


@pytest.mark.parametrize(
    ("name", "accumulate", "max_steps"), [("efficient_dlm_qwen3_4b", 16, 11920), ("fast_dllm_v2_qwen2_5_1_5b", 4, 6000)]
)
def test_real_scale_recipes_run_on_eight_gpus(name, accumulate, max_steps):
    """From the YAML itself: the golden dumps are written with another accelerator and number of devices."""
    trainer = catalog.compose(ROOT / "recipes" / f"{name}.yaml")["trainer"]
    callbacks = [callback["class_path"].rpartition(".")[2] for callback in trainer.pop("callbacks")]
    loggers = [logger["class_path"].rpartition(".")[2] for logger in trainer.pop("logger")]
    assert callbacks == ["Checkpoints", "LearningRateMonitor", "Throughput", "WeightDrift", "Samples"]
    assert loggers == ["MetricsCSV", "TensorBoardLogger"]
    assert trainer == {
        "accelerator": "gpu",
        "devices": 8,
        "strategy": "fsdp2",
        "precision": "bf16-mixed",
        "accumulate_grad_batches": accumulate,
        "max_steps": max_steps,
        "max_epochs": 1,
        "val_check_interval": 500 * accumulate,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 10,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }


@pytest.mark.parametrize(("name", "tokens"), [("efficient_dlm_qwen3_4b", 25e9), ("fast_dllm_v2_qwen2_5_1_5b", 3.15e9)])
def test_real_scale_budgets_are_the_papers(name, tokens):
    config = catalog.compose(ROOT / "recipes" / f"{name}.yaml")
    trainer, data = config["trainer"], config["data"]["init_args"]
    rows = data["batch_size"] * trainer["devices"] * trainer["accumulate_grad_batches"]
    assert trainer["max_steps"] * rows * data["row_length"] == pytest.approx(tokens, rel=0.01)
