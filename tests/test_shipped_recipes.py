"""Every YAML on disk: it parses, instantiates, carries its help, and resolves to what the golden dump says."""

from __future__ import annotations

import os
import re
import runpy
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from dlm_lightning import attention, catalog
from dlm_lightning.parsing import PLACEHOLDER, parse
from dlm_lightning.source import build_config

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
    "block_causal_qwen3_0_6b_24gb": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "complementary_mask_qwen3_1_7b_80gb": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "efficient_dlm_qwen3_8b_4_nodes": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
}  # fmt: skip
PARAMETERS = {
    "efficient_dlm_qwen3_4b": 4.02e9,
    "fast_dllm_v2_qwen2_5_1_5b": 1.54e9,
    "block_causal_qwen3_0_6b_24gb": 0.6e9,
    "complementary_mask_qwen3_1_7b_80gb": 1.72e9,
    "efficient_dlm_qwen3_8b_4_nodes": 8.19e9,
}
TOKENS = {name: 151665 if "qwen2_5" in name else 151669 for name in SIZES}  # of the published tokenizers


MEMORY = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))  # docs/scaling.md's arithmetic
GIGABYTES = {name: 24 if name.endswith("24gb") else 80 for name in SIZES}


def on_this_machine(path: Path) -> list[str]:
    """Overrides that let a recipe for GPUs instantiate where there is none."""
    here = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=1"]
    return here if path.stem in SIZES else []


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
    config = build_config(SIZES[name])
    recipe.__dict__["source"] = SimpleNamespace(config=config, tokenizer=lambda: tokens, diffusion=None)
    precision = SimpleNamespace(precision="bf16-mixed")
    strategy = SimpleNamespace(shard=lambda denoiser, source, mask_row: None, precision_plugin=precision)
    recipe._trainer = SimpleNamespace(strategy=strategy)
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
    ("name", "nodes", "devices", "accumulate", "max_steps"),
    [
        ("efficient_dlm_qwen3_4b", 1, 8, 64, 11920),
        ("fast_dllm_v2_qwen2_5_1_5b", 1, 8, 8, 6000),
        ("block_causal_qwen3_0_6b_24gb", 1, 1, 16, 10000),
        ("complementary_mask_qwen3_1_7b_80gb", 1, 1, 32, 6000),
        ("efficient_dlm_qwen3_8b_4_nodes", 4, 8, 16, 11920),
    ],
)
def test_real_scale_recipes_run_on_the_gpus_they_are_for(name, nodes, devices, accumulate, max_steps):
    """From the YAML itself: the golden dumps are written with another accelerator and number of devices."""
    trainer = catalog.compose(ROOT / "recipes" / f"{name}.yaml")["trainer"]
    callbacks = [callback["class_path"].rpartition(".")[2] for callback in trainer.pop("callbacks")]
    loggers = [logger["class_path"].rpartition(".")[2] for logger in trainer.pop("logger")]
    assert callbacks == ["Checkpoints", "LearningRateMonitor", "Throughput", "WeightDrift", "Samples", "SavePretrained"]
    assert loggers == ["MetricsCSV", "TensorBoardLogger"]
    assert trainer == {
        "accelerator": "gpu",
        "devices": devices,
        **({"num_nodes": nodes} if nodes > 1 else {}),
        **({"strategy": "fsdp2"} if devices > 1 else {}),
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


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("efficient_dlm_qwen3_4b", 25e9),
        ("fast_dllm_v2_qwen2_5_1_5b", 3.15e9),
        ("block_causal_qwen3_0_6b_24gb", 0.66e9),
        ("complementary_mask_qwen3_1_7b_80gb", 0.79e9),
        ("efficient_dlm_qwen3_8b_4_nodes", 25e9),
    ],
)
def test_real_scale_budgets_are_what_their_comments_say(name, tokens):
    config = catalog.compose(ROOT / "recipes" / f"{name}.yaml")
    trainer, data = config["trainer"], config["data"]["init_args"]
    ranks = trainer.get("num_nodes", 1) * trainer["devices"]
    rows = data["batch_size"] * ranks * trainer["accumulate_grad_batches"]
    assert trainer["max_steps"] * rows * data["row_length"] == pytest.approx(tokens, rel=0.01)


@pytest.mark.parametrize("name", SIZES)
def test_real_scale_recipes_fit_their_gpus_by_the_documents_arithmetic(name):
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert MEMORY["SIZES"][name] == (*(SIZES[name][key] for key in keys), SIZES[name]["tie_word_embeddings"])
    parts = MEMORY["parts"](name)
    if not parts["gathered"]:
        assert parts["states"] == pytest.approx(18e-9 * PARAMETERS[name], rel=0.01)
    assert parts["peak"] + 2 < GIGABYTES[name]


def test_the_documents_memory_table_is_what_the_command_prints():
    assert MEMORY["table"]() in (ROOT / "docs" / "scaling.md").read_text()
