"""Compiled layers: the same run, and one sentence where no compiler works."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor

from dlm_lightning.compilation import check_compiler


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["auto", "dense"])
@pytest.mark.parametrize("recipe", ["complementary_mask", "full_bidirectional"])
def test_a_compiled_run_is_the_same_up_to_rounding(dlm, small, tmp_path, recipe, attention):
    found = {}
    for compiled in (False, True):
        words = small(model__compile=compiled, model__attention=attention, trainer__callbacks="[]")
        dlm("fit", recipe, *words, "--run", str(compiled), cwd=tmp_path)
        found[compiled] = losses(tmp_path / str(compiled))
    assert len(found[True]) == 6 and found[True] == pytest.approx(found[False], rel=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_each_layer_is_compiled_where_the_recipe_says_so(typed, small, tmp_path, monkeypatch, compiled):
    layers = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: layers.append(type(self).__name__))
    words = small(model__compile=compiled, trainer__callbacks="[]", trainer__max_steps=1)
    assert typed("fit", "block_causal", *words, "--run", "mine", cwd=tmp_path).code == 0
    last = ["Qwen3Attention", "Qwen3MLP", "Qwen3RMSNorm", "Qwen3RMSNorm"]  # its feed-forward part has fewer tokens
    assert layers == ["Qwen3DecoderLayer", *last] * compiled


def test_without_a_compiler_nothing_is_trained(refused, small, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with inductor.patch({"cpp.cxx": (None, "/nowhere/c++")}):
        said = refused("fit", "block_causal", *small(model__compile=True), "--run", "mine", cwd=tmp_path)
    assert said == "model.compile: to compile for a CPU needs a C++ compiler, as $CXX or g++, and none works here"


def test_a_gpu_needs_triton(monkeypatch):
    monkeypatch.setattr("dlm_lightning.compilation.has_triton", lambda: False)
    with pytest.raises(ValueError, match="needs Triton"):
        check_compiler(torch.device("cuda"))
