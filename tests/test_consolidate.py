"""`dlm consolidate`: the newest checkpoint of any strategy as a folder that plain transformers loads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

KEEP = "[{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints}]"
ALL = KEEP[:-1] + ", {class_path: dlm_lightning.callbacks.save_pretrained.SavePretrained}]"


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same network, to the last bit, under the same names."""
    weights = [AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict() for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) > 20
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"trainer.precision": "bf16-true"},
        pytest.param({"trainer.devices": 2, "trainer.strategy": "fsdp2", "data.batch_size": 2}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("adapters", [False, True])
def test_it_is_the_folder_that_a_finished_run_leaves(adapters, more, source_folder, dlm, typed, small, tmp_path):
    words = small(
        trainer__callbacks=ALL,
        **({"model__lora__rank": 3, "model__source": source_folder("qwen3")} if adapters else {}),
    )
    words += [f"{key}={value}" for key, value in more.items()]
    if "trainer.devices" in more:
        dlm("fit", "block_causal", *words, "--run", "run", cwd=tmp_path)
    else:
        assert typed("fit", "block_causal", *words, "--run", "run", cwd=tmp_path).code == 0
    said = typed("consolidate", "run", "--out", "out", cwd=tmp_path)
    assert (said.code, said.out) == (0, "out\n")
    assert same(tmp_path / "run" / "model", tmp_path / "out")
    assert (tmp_path / "run" / "model" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


def test_a_run_that_is_not_finished_gets_its_model(finished, typed, tmp_path):
    said = typed("consolidate", "done", cwd=tmp_path)
    assert (said.code, said.out) == (0, "done/model\n"), said.err
    trained = torch.load(finished / "checkpoints" / "step=6" / "state.ckpt", weights_only=True)["state_dict"]
    for name, value in AutoModelForCausalLM.from_pretrained(finished / "model").state_dict().items():
        assert torch.equal(value, trained[f"denoiser.network.{name}"]), name


def test_a_source_of_ones_own_needs_no_source(typed, corpus, tmp_path):
    model = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8, "model_type": "qwen3"}
    model |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    words = [f"data.paths=[{corpus}]", "data.val_share=0.2", "data.row_length=24", "data.val_rows=2"]
    words += ["data.vocab_size=300", "trainer.max_steps=2", "trainer.val_check_interval=2", f"model.config={model}"]
    said = typed("fit", "ar_source", *words, f"trainer.callbacks={KEEP}", "--run", "run", cwd=tmp_path)
    assert said.code == 0, said.err
    assert typed("consolidate", "run", cwd=tmp_path).code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.vocab_size == len(tokenizer) + 1
    assert "where everything lies" in typed("summary", "run", cwd=tmp_path).out


def test_what_is_there_is_not_overwritten(finished, refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    assert refused("consolidate", "done", "--out", "mine", cwd=tmp_path).startswith("mine is there already")
    assert "is not a run folder" in refused("consolidate", "mine", cwd=tmp_path)


def most_memory(run: Path) -> float:
    """What `dlm consolidate` holds at most of memory of its own, in MiB, looked at every few milliseconds."""
    command = [sys.executable, "-m", "dlm_lightning.cli", "consolidate", run, "--out", run / "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as running:
        most = 0
        while running.poll() is None:
            _, found, rest = Path(f"/proc/{running.pid}/status").read_text().partition("RssAnon:")
            most = max(most, int(rest.split()[0]) if found else 0)
            time.sleep(0.005)
    assert running.returncode == 0
    return most / 1024


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["trainer.devices=2", "trainer.strategy=fsdp2", "data.batch_size=2"]])
def test_it_holds_one_copy(more, source_folder, dlm, small, tmp_path):
    """A model of 200 MiB against one of 100 KiB, whose process holds all that is not weights."""
    config = AutoConfig.from_pretrained(source_folder("qwen3", tied=True))
    config.update({"hidden_size": 1280, "intermediate_size": 6144})
    large = AutoModelForCausalLM.from_config(config)
    large.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(source_folder("qwen3", tied=True)).save_pretrained(tmp_path / "large")
    size = sum(parameter.nbytes for parameter in large.parameters()) / 2**20
    assert size > 150
    most = []
    for run, source in (("large", {"model__source": tmp_path / "large"}), ("small", {})):
        words = small(**source, trainer__callbacks=KEEP, trainer__max_steps=1, trainer__val_check_interval=1)
        dlm("fit", "block_causal", *words, *more, "--run", f"run-{run}", cwd=tmp_path)
        most.append(most_memory(tmp_path / f"run-{run}"))
    assert 0.9 * size < most[0] - most[1] < 1.5 * size
