"""Each family by name, each pattern: fit, drift, checkpoint, resume, and the model that plain transformers reloads."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from dlm_lightning import checkpoint
from dlm_lightning.layouts import Diffusion
from dlm_lightning.parsing import WITHOUT_DEVICES
from dlm_lightning.reopening import reopen
from dlm_lightning.source import Source
from dlm_lightning.view import AUTOREGRESSIVE, Batch

OPTIONS = (
    *(
        "data.row_length=16",
        "data.batch_size=2",
        "data.val_rows=2",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
    ),
    *("model.warmup_steps=0", "trainer.enable_progress_bar=false", "trainer.logger=false"),
)
CALLBACKS = """
    - {class_path: dlm_lightning.callbacks.checkpoints.Checkpoints, init_args: {every_n_steps: 1, keep: 2}}
    - {class_path: dlm_lightning.callbacks.weight_drift.WeightDrift, init_args: {every_n_steps: 1}}
    - {class_path: dlm_lightning.callbacks.save_pretrained.SavePretrained}
"""
RECIPES = {"full_bidirectional": "next_token", "block_causal": "none", "complementary_mask": "next_token"}


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(run)
    assert newest is not None
    return checkpoint.read(newest)["state_dict"]


def causal_logits(run: Path, ids_L: torch.Tensor) -> torch.Tensor:
    """Logits [L - 1, 300] of the run's newest checkpoint under a causal view, of each token but the first."""
    _, cli = reopen(str(run), *WITHOUT_DEVICES)
    cli.model.configure_model()
    checkpoint.load_weights(cli.model, checkpoint.newest(run))
    position_BL, nothing_BL = torch.arange(len(ids_L))[None], torch.zeros(1, len(ids_L))
    zero_BL = torch.zeros_like(position_BL)
    batch = Batch(ids_L[None], position_BL, zero_BL, position_BL > 0, nothing_BL, nothing_BL, zero_BL[:, 0])
    view = AUTOREGRESSIVE.lay_out(batch, [], cli.model.mask_id)
    with torch.no_grad():
        return cli.model.denoiser(view, torch.arange(1, len(ids_L)))[:, :300]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_family_converts(family, recipe, source_folder, corpus, typed, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        f"extends: {Path(__file__).parents[1]}/recipes/{recipe}.yaml\ntrainer:\n  callbacks:{CALLBACKS}"
    )
    run, source = tmp_path / "run", Source(str(source_folder(family)))
    options = [f"model.source={source.folder}", f"data.paths=[{corpus}]", *OPTIONS]
    done = typed("fit", "mine.yaml", *options, "--run", run, cwd=tmp_path)
    assert done.code == 0, done.err

    undisturbed = weights(run)
    shutil.rmtree(run / "model")
    shutil.rmtree(checkpoint.newest(run))
    resumed = typed("resume", run, cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in undisturbed.items())

    drift = pq.read_table(run / "drift" / "drift.parquet").to_pylist()
    names = {row["name"] for row in drift if row["name"]}
    network = AutoModelForCausalLM.from_pretrained(run / "model")
    assert names == {name for name, _ in network.named_parameters()}
    assert {row["step"] for row in drift} == {1, 2}
    for row in drift:
        assert math.isfinite(row["value"])
        if row["metric"] == "mean_abs" and row["name"]:
            now, before = (
                x.get_parameter(row["name"]) for x in (network, AutoModelForCausalLM.from_pretrained(source.folder))
            )
            if row["step"] == 2:
                assert row["value"] == pytest.approx((now[: len(before)] - before).abs().mean().item(), rel=1e-3)

    ids_L = torch.arange(20) * 13 % 300
    with torch.no_grad():
        expected = network(ids_L[None], use_cache=False).logits[0, :-1, :300]
    assert torch.allclose(causal_logits(run, ids_L), expected, atol=2e-5)
    pattern = (None, "noisy") if recipe == "full_bidirectional" else (16, "clean")
    stated = Diffusion(RECIPES[recipe], pattern[0], 300, pattern[1], "block")
    assert Source(str(run)).diffusion == stated
    assert "dlm" not in json.loads((source.folder / "config.json").read_text())
