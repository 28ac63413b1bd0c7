"""`dlm drift A B`: the same numbers as while training, wherever the two checkpoints lie."""

from __future__ import annotations

import shutil

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dlm_lightning.drift import between, measure
from dlm_lightning.drift_between import opened
from dlm_lightning.source import Source

KEEP = "[{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints, init_args: {every_n_steps: 3, keep: 2}}, "
ALL = KEEP + "{class_path: dlm_lightning.callbacks.save_pretrained.SavePretrained}]"


@pytest.fixture
def moved(source_folder, tmp_path):
    """A copy of a source of which one matrix has moved."""
    folder = tmp_path / "moved"
    shutil.copytree(source_folder("qwen3"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 0.25
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_two_folders(source_folder, moved, typed, tmp_path):
    said = typed("drift", source_folder("qwen3"), moved, "--out", "out", cwd=tmp_path)
    assert said.code == 0, said.err
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in said.out.splitlines() if "│" in line}
    network = AutoModelForCausalLM.from_pretrained(moved)
    share = network.model.layers[0].mlp.up_proj.weight.numel() / sum(p.numel() for p in network.parameters())
    assert rows["up"] == "0.125" and rows["down"] == "0" and rows["all"] == f"{0.25 * share:.3g}"
    kept = pq.read_table(tmp_path / "out" / "drift.parquet").to_pylist()
    kept = {(row["layer"], row["group"], row["metric"]): row["value"] for row in kept}
    assert kept[1, "up", "mean_abs"] == 0.25
    assert (tmp_path / "out" / "drift.png").stat().st_size > 1000
    expected = measure(network, Source(str(source_folder("qwen3"))))
    found = {drift.name: drift for drift in between(opened(str(source_folder("qwen3"))), opened(str(moved)))}
    assert found == {drift.name: drift for drift in expected}


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize(
    "strategy", ["auto", pytest.param("fsdp2", marks=pytest.mark.slow, id="two processes' shards")]
)
def test_checkpoints_of_a_run(adapters, strategy, source_folder, dlm, typed, small, tmp_path):
    """The last one is the finished model, with adapters merged; an earlier one lies between it and the source."""
    source = str(source_folder("qwen3"))
    words = small(trainer__callbacks=ALL, model__source=source, **({"model__lora__rank": 3} if adapters else {}))
    if strategy == "auto":
        assert typed("fit", "block_causal", *words, "--run", "run", cwd=tmp_path).code == 0
    else:
        words += ["trainer.devices=2", "trainer.strategy=fsdp2", "data.batch_size=2"]
        dlm("fit", "block_causal", *words, "--run", "run", cwd=tmp_path)
    run = tmp_path / "run"
    three, six = (str(run / "checkpoints" / f"step={step}") for step in (3, 6))
    assert not any(drift.absolute for drift in between(opened(str(run)), opened(six)))
    whole = sum(drift.absolute for drift in between(opened(source), opened(six)))
    half = sum(drift.absolute for drift in between(opened(source), opened(three)))
    rest = sum(drift.absolute for drift in between(opened(three), opened(six)))
    assert 0 < half < whole <= half + rest
    shutil.rmtree(run / "model")  # as of a run that is not finished
    assert not any(drift.absolute for drift in between(opened(str(run)), opened(six)))
    said = typed("drift", three, "run", cwd=tmp_path)
    assert said.code == 0 and "module group" in said.out, said.err


def test_what_only_one_has_is_said(source_folder, typed, tmp_path):
    said = typed("drift", source_folder("qwen2"), source_folder("qwen3"), cwd=tmp_path)
    assert said.code == 0 and "left out: " in said.out and "that only one of them has" in said.out


def test_what_cannot_be_compared_is_refused(source_folder, finished, moved, typed, tmp_path):
    qwen3, checkpoint = source_folder("qwen3"), finished / "checkpoints" / "step=6"
    weights = load_file(moved / "model.safetensors")
    save_file({name: torch.zeros(3, 5) for name in weights}, moved / "model.safetensors", {"format": "pt"})
    other = tmp_path / "other"
    shutil.copytree(qwen3, other)
    save_file({"something": torch.zeros(3)}, other / "model.safetensors", {"format": "pt"})
    (checkpoint / "state.ckpt").write_bytes(b"damaged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for words, says in (
        ((qwen3, moved), "not checkpoints of one model"),
        ((qwen3, other), "no weights of the same name"),
        ((qwen3, "nowhere"), "dlm: there is no folder nowhere"),
        ((checkpoint, qwen3), "has 7 of"),
        ((qwen3, qwen3, "--out", "full"), "already holds something"),
    ):
        said = typed("drift", *words, cwd=tmp_path)
        assert said.code == 1 and says in said.err and said.err.count("\n") == 1, said.err
