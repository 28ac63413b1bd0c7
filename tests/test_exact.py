"""A resume is exact: every shipped recipe, from every step, weights and optimizer and metrics to the last bit."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dlm_lightning import catalog
from dlm_lightning.checkpoint import STATE

STEPS = 6
SHIPPED = [  # those for GPUs set the same classes otherwise
    pytest.param(path.stem, marks=[pytest.mark.slow] if "qwen" in path.stem else [])
    for path in sorted(catalog.folder("recipes").glob("*.yaml"))
]
CALLBACKS = (
    "[{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints, init_args: {every_n_steps: 1, keep: 99}}, "
    "{class_path: lightning.pytorch.callbacks.LearningRateMonitor}, "
    "{class_path: dlm_lightning.callbacks.weight_drift.WeightDrift, init_args: {every_n_steps: 2}}]"
)


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]
    return [row for row in rows if set(row.values()) - {"", row["step"], row["epoch"]}]


def leaves(value: object) -> list[object]:
    """What nested dicts and lists hold, tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return [value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else value.item()]
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in [key, *leaves(value[key])]]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


@pytest.fixture
def whole(typed: Callable, small: Callable, source_folder: Callable, tmp_path: Path) -> Callable[..., Path]:
    """`whole(recipe, accumulate, **overrides)`: a run into its second epoch, validated every second step.

    Each step has a checkpoint.
    """

    def run(recipe: str, accumulate: int = 2, **more: object) -> Path:
        here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
        words = small(
            model__source=source_folder("qwen2" if "qwen2" in recipe else "qwen3", tied=True),
            data__row_length=64,
            data__batch_size=16 // accumulate,
            trainer__max_steps=STEPS,
            trainer__accumulate_grad_batches=accumulate,
            trainer__val_check_interval=2 * accumulate,
            trainer__callbacks=CALLBACKS,
            **{f"trainer__{key}": value for key, value in here.items()},
            **more,
        )
        none = ["model.config=null", "data.vocab_size=null"] if recipe == "ar_source" else []
        said = typed("fit", recipe, *words, *none, "--run", "whole", cwd=tmp_path)
        assert said.code == 0, said.err
        return tmp_path / "whole"

    return run


def assert_resumes(whole: Path, step: int, typed: Callable) -> None:
    cut = Path(shutil.copytree(whole, whole.parent / f"cut{step}"))
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(cut / "checkpoints" / f"step={later}")
    said = typed("resume", cut, cwd=whole.parent)
    assert said.code == 0, said.err
    assert metrics(cut) == metrics(whole)
    for later in range(step + 1, STEPS + 1):
        contents = [
            torch.load(run / "checkpoints" / f"step={later}" / STATE, weights_only=True) for run in (cut, whole)
        ]
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            ours, theirs = (leaves(content[key]) for content in contents)
            assert len(ours) and ours == theirs, (later, key)


@pytest.mark.parametrize("recipe", SHIPPED)
def test_every_shipped_recipe_resumes_to_the_bit(recipe, whole, typed):
    run = whole(recipe)
    assert len([row for row in metrics(run) if row["train/loss"]]) == STEPS
    assert_resumes(run, 3, typed)


def test_several_views_resume_to_the_bit(whole, typed):
    assert_resumes(whole("block_causal", model__views=3), 3, typed)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_resumes_from_every_step(accumulate, whole, typed):
    run = whole("complementary_mask", accumulate)
    for step in range(1, STEPS):
        assert_resumes(run, step, typed)
