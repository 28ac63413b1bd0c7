"""Kills at random moments: the short version of benchmarks/chaos.py, whose long one is `make chaos`."""

from __future__ import annotations

import importlib.util
import random
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def chaos() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chaos", Path(__file__).parents[1] / "benchmarks" / "chaos.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("recipe", "way"),
    [
        ("block_causal", "1"),
        pytest.param("full_bidirectional", "1", marks=pytest.mark.slow),
        pytest.param("complementary_mask", "2 ddp", marks=pytest.mark.slow),
        pytest.param("block_causal", "2 fsdp2", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_undisturbed(recipe, way, chaos, tmp_path):
    setting = chaos.prepare(tmp_path)
    counted = chaos.disturb(tmp_path, setting, recipe, way, 3, random.Random(f"test {recipe} {way}"))
    assert counted.total() == 3


def test_one_bit_is_noticed(chaos, typed, tmp_path):
    """The comparison can fail: on a weight, on a moment of the optimizer, on a figure of metrics.csv."""
    setting = [word for word in chaos.prepare(tmp_path) if "callbacks" not in word and "max_steps" not in word]
    keep = "[{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints}]"
    words = [*setting, f"trainer.callbacks={keep}", f"trainer.max_steps={chaos.STEPS}", "data.batch_size=1"]
    said = typed("fit", "block_causal", *words, "trainer.limit_val_batches=0", "--run", "whole", cwd=tmp_path)
    assert said.code == 0, said.err
    whole, state = tmp_path / "whole", Path("checkpoints") / f"step={chaos.STEPS}" / "state.ckpt"
    for number, place in enumerate(["state_dict", "optimizer_states", "metrics"]):
        copy = Path(shutil.copytree(whole, tmp_path / f"copy{number}"))
        assert not chaos.difference(copy, whole)
        if place == "metrics":
            text = (copy / "metrics.csv").read_text()
            (copy / "metrics.csv").write_text(text.replace("0.1", "0.2", 1))
        else:
            content = torch.load(copy / state, weights_only=True)
            first = next(tensor for tensor in chaos.tensors(content[place]) if tensor.ndim > 1)
            first.view(torch.int32)[0, 0] ^= 1
            torch.save(content, copy / state)
        assert chaos.difference(copy, whole).startswith(place)
