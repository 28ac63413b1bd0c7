"""Runs that train few parameters in little memory: the same on any number of ranks, after a resume, saved merged."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dlm_lightning.decode.decoder import decode
from dlm_lightning.decode.plan import Plan
from dlm_lightning.decode.stopper import Stopper
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.recipes.complementary_mask import ComplementaryMask
from dlm_lightning.recipes.full_bidirectional import FullBidirectional

SAVING = (
    "[{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints, init_args: {every_n_steps: 2, keep: 9}}, "
    "{class_path: dlm_lightning.callbacks.weight_drift.WeightDrift}, "
    "{class_path: dlm_lightning.callbacks.save_pretrained.SavePretrained}]"
)
ADAPTED = {"model__lora__rank": 3, "model__freeze": '["model.layers.1.*layernorm*"]', "model__lr_scale__mask_row": 4}


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]
    return [row for row in rows if set(row.values()) - {"", row["step"], row["epoch"]}]


def numbers(run: Path, name: str) -> list[float]:
    return [float(row[name]) for row in metrics(run) if row.get(name)]


def saved(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def apart(a: Path, b: Path) -> float:
    """The largest relative distance between two runs' saved weights, tensor by tensor."""
    one, two = saved(a), saved(b)
    assert one.keys() == two.keys()
    return max(((two[name] - value).norm() / value.norm()).item() for name, value in one.items())


@pytest.fixture
def one(typed, small, source_folder, tmp_path):
    """`one(run, tied=…, **overrides)`: a run of `block_causal` in this process, its clipping active."""

    def run(name, tied=False, **more):
        words = small(**{"model__source": source_folder("qwen3", tied), "trainer__callbacks": SAVING, **more})
        said = typed("fit", "block_causal", *words, "--run", name, cwd=tmp_path)
        assert said.code == 0, said.err
        return tmp_path / name

    return run


@pytest.mark.parametrize(
    ("ranks", "tied", "options"),
    [
        (2, False, ADAPTED),
        (4, True, {"model__lr_scale__embedding": 0, "data__val_rows": 4}),  # 301 rows: 76, 76, 76 and 73
    ],
)
def test_fsdp2_clips_trains_saves_and_measures_as_one_process(ranks, tied, options, one, dlm, small, tmp_path,
                                                              source_folder):  # fmt: skip
    """Uneven shards: the vocabulary has an odd number of rows, the adapters have three."""
    alone = one("alone", tied, trainer__gradient_clip_val=0.05, **options)
    assert apart(alone, one("unclipped", tied, trainer__gradient_clip_val=0, **options)) > 1e-4
    sharded = {"trainer__devices": ranks, "trainer__strategy": "fsdp2", "data__batch_size": 4 // ranks}
    words = small(
        model__source=source_folder("qwen3", tied), trainer__callbacks=SAVING, trainer__gradient_clip_val=0.05,
        model__activation_checkpointing="true", **options, **sharded,
    )  # fmt: skip
    dlm("fit", "block_causal", *words, "--run", "sharded", cwd=tmp_path)
    run = tmp_path / "sharded"
    assert apart(alone, run) < 1e-5
    for name in ("train/loss", "val/nelbo", "drift/q/rel_fro", "drift/down/w1", "drift/norm/mean_abs"):
        assert numbers(run, name) == pytest.approx(numbers(alone, name), rel=1e-4), name
        assert numbers(run, name)
    if ranks == 2:
        shutil.copytree(run, tmp_path / "cut")
        for left_over in ("checkpoints/step=6", "checkpoints/step=4", "model"):
            shutil.rmtree(tmp_path / "cut" / left_over)
        dlm("resume", "cut", cwd=tmp_path)
        assert metrics(run) == metrics(tmp_path / "cut")
        assert apart(run, tmp_path / "cut") == 0
        assert "tokens per forward" in dlm("summary", "cut", cwd=tmp_path).stdout


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_bf16_true_on_two_ranks_is_close_to_one(strategy, one, dlm, small, tmp_path, source_folder):
    """The adapters are on, so that this is also their start under each strategy."""
    alone = one("alone", trainer__precision="bf16-true", model__lora__rank=3)
    words = small(
        model__source=source_folder("qwen3"), trainer__callbacks=SAVING, trainer__precision="bf16-true",
        model__lora__rank=3, trainer__devices=2, trainer__strategy=strategy, data__batch_size=2,
    )  # fmt: skip
    dlm("fit", "block_causal", *words, "--run", "two", cwd=tmp_path)
    for name in ("train/loss", "val/nelbo", "val/ar_nll"):
        assert numbers(tmp_path / "two", name) == pytest.approx(numbers(alone, name), rel=0.02), name
    assert numbers(tmp_path / "two", "val/ar_nll")[0] == pytest.approx(numbers(alone, "val/ar_nll")[0], rel=1e-3)
    assert {value.dtype for value in saved(tmp_path / "two").values()} == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_resume_is_exact_and_the_run_is_summed_up(precision, one, typed, tmp_path):
    options = {"model__activation_checkpointing": "true", "trainer__accumulate_grad_batches": 2, **ADAPTED}
    run = one("whole", trainer__precision=precision, **options)
    shutil.copytree(run, tmp_path / "cut")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step={step}")
    assert typed("resume", "cut", cwd=tmp_path).code == 0
    assert metrics(run) == metrics(tmp_path / "cut")
    assert apart(run, tmp_path / "cut") == 0
    for word in ("summary", "validate"):
        said = typed(word, "cut", cwd=tmp_path)
        assert said.code == 0, said.err
    assert numbers(run, "drift/norm/mean_abs") and numbers(run, "drift/q/mean_abs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__lora__rank": 4}, "model.lora {'rank': 3, "),
        ({"model__freeze": '["*norm*"]'}, "model.freeze ('model.layers.1.*layernorm*',), this run has ('*norm*',)"),
        ({"model__lr_scale__mask_row": 2}, "model.lr_scale.mask_row 4.0, this run has 2.0"),
    ],
)
def test_a_checkpoint_of_other_parameters_is_refused(change, message, one, typed, small, tmp_path, source_folder):
    one("whole", trainer__max_steps=2, trainer__val_check_interval=2, **ADAPTED)
    words = small(model__source=source_folder("qwen3"), **{**ADAPTED, **change, "trainer__max_steps": 2})
    start = ["--ckpt_path", "whole/checkpoints/step=2"]
    said = typed("fit", "block_causal", *words, "trainer.val_check_interval=2", *start, cwd=tmp_path)
    assert said.code == 1 and message in said.err


@pytest.mark.parametrize("recipe_class", [FullBidirectional, BlockCausal, ComplementaryMask])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(
    recipe_class, make_recipe, make_batch, loss_and_gradients, assert_same
):
    batch = make_batch([[9, 7], [16]])
    results, calls = [], []
    for activation_checkpointing in (False, True):
        recipe = make_recipe(recipe_class, activation_checkpointing=activation_checkpointing)
        count = []
        recipe.denoiser.network.model.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        copies = recipe.corrupt(batch, recipe.pattern)
        results.append(loss_and_gradients(recipe.denoiser, batch, copies, recipe.pattern))
        calls.append(len(count))
    assert calls == [1, 2], "the second forward is the one of the backward pass"
    for name, gradient in results[0][1].items():
        assert torch.equal(results[1][1][name], gradient), name
    assert_same(*results)


def test_decoding_after_training_with_activation_checkpointing_keeps_its_cache(make_recipe):
    plain, recipe = (make_recipe(BlockCausal, block_size=4, activation_checkpointing=flag) for flag in (False, True))
    recipe.eval()
    expected, found = (decode(r.denoiser, [[1, 2, 3]], Plan(stopper=Stopper(9))) for r in (plain, recipe))
    assert found.rows == expected.rows and found.cached_share > 0
