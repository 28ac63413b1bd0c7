"""`dlm eval`: what it keeps is what is measured by hand, of the newest checkpoint; what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from dlm_lightning import checkpoint, evaluation
from dlm_lightning.callbacks.yardstick import STREAM
from dlm_lightning.likelihood import Blocks, bound, redrawn
from dlm_lightning.reopening import reopen
from dlm_lightning.report.content import flat


@pytest.fixture
def measured(finished, typed, tmp_path):
    said = typed("eval", finished, "--tasks", "copy", "--tasks", "python", "--prompts", 3, cwd=tmp_path)
    assert said.code == 0, said.err
    assert said.out.endswith(f"{finished / 'evaluation.json'}\n")
    return finished


def test_it_measures_the_newest_checkpoint(measured):
    found = evaluation.load(measured)
    assert found["step"] == 6 and found["pattern"]["block_size"] == 16
    _, cli = reopen(str(measured), "--trainer.logger=false")
    recipe, data = cli.model, cli.datamodule
    recipe.trainer = data.trainer = cli.trainer
    cli.trainer.strategy.connect(recipe)
    data.setup("validate")
    recipe.configure_model()
    checkpoint.load_weights(recipe, checkpoint.newest(measured))
    recipe.eval()
    total = tokens = 0.0
    with torch.no_grad():
        for batch in data.val_dataloader():
            for turn in range(4):
                noisy, _ = redrawn(batch, 0, STREAM, turn)
                total += bound(recipe.denoiser, noisy, Blocks(4), turn).share_BL.sum().item()
            tokens += batch.maskable_BL.sum().item()
    assert found["bound"]["masked"]["4"] == pytest.approx(total / tokens, rel=1e-4)
    assert set(found["bound"]["absent"]) == {"1", "4", "16", "32"}
    assert found["val"]["nelbo"] > 0 and found["representation"]["clean"]["cka"]["2"] > 0.9
    assert found["gradient"]["noise"] > 0
    assert found["work"]["forward_tokens_per_step"] == 4 * 24 * 2


def test_every_task_is_asked_with_every_decoder(measured):
    rows = evaluation.load(measured)["tasks"]
    assert [(row["task"], row["decoder"]) for row in rows] == [
        (task, decoder) for task in ("copy 4-10", "python") for decoder in evaluation.DECODERS
    ]
    for row in rows:
        assert row["count"] == 3 and 0 <= row["exact"] <= 3 and row["tokens"] > 0
    k = {row["decoder"]: row["tokens"] / row["forwards"] for row in rows if row["task"] == "copy 4-10"}
    assert k["1 per forward"] <= 1 < k["4 per forward"] <= 4 < k["8 per forward"] <= 8


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_share_out_the_rows(strategy, finished, dlm, tmp_path):
    """Six rows in batches of four: on two ranks, one of them is filled up with padding."""
    found = []
    for words in ([], ["trainer.devices=2", f"trainer.strategy={strategy}"]):
        said = dlm("eval", finished, *words, "--prompts", 0, cwd=tmp_path)
        assert said.stdout.count("evaluation.json") == 1
        found.append(evaluation.load(finished))
    alone, together = found
    assert ("gradient" in together) == (strategy == "ddp")
    for name in ("bound", "val", "representation", "profile"):
        a, b = (flat({name: part[name]}) for part in (alone, together))
        assert b == pytest.approx(a, rel=1e-3), name
    assert together["work"] == alone["work"]


def test_what_was_measured_at_an_earlier_step_no_longer_counts(measured):
    assert evaluation.load(measured) is not None
    found = json.loads((measured / "evaluation.json").read_text())
    (measured / "evaluation.json").write_text(json.dumps({**found, "step": 3}))
    assert evaluation.load(measured) is None


def test_what_cannot_be_measured_is_refused(finished, refused, tmp_path):
    for words, message in (
        (["nowhere"], "nowhere is not a run folder"),
        ([finished, "--tasks", "copy", "--prompts", "-2"], "--prompts must be at least 0, not -2"),
        ([finished, "data.val_rowz=3"], "data.val_rowz"),
    ):
        assert message in refused("eval", *words, cwd=tmp_path)
    shutil.rmtree(finished / "checkpoints")
    assert "has no complete checkpoint to measure" in refused("eval", finished, cwd=tmp_path)
