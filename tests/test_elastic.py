"""A run goes on with other ranks, another strategy, other micro-batches: same samples, same noise, same losses."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from dlm_lightning import checkpoint, manifest
from dlm_lightning.checkpoint import STATE

BEFORE, AFTER = 6, 20  # steps
WAYS = {
    "one": {},
    "accumulating": {"data.batch_size": 1, "trainer.accumulate_grad_batches": 4, "trainer.val_check_interval": 32},
    "ddp": {"data.batch_size": 2, "trainer.devices": 2, "trainer.strategy": "ddp"},
    "fsdp2": {"data.batch_size": 2, "trainer.devices": 2, "trainer.strategy": "fsdp2"},
    "fsdp2 of one": {"trainer.strategy": "fsdp2"},
}
DEFAULTS = {"data.batch_size": 4, "trainer.accumulate_grad_batches": 1, "trainer.val_check_interval": 8,
            "trainer.devices": 1, "trainer.strategy": "auto"}  # fmt: skip


def words(way: str) -> list[str]:
    return [f"{key}={value}" for key, value in (DEFAULTS | WAYS[way]).items()]


def rows(run: Path, name: str) -> dict[int, float]:
    with (run / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


@pytest.fixture(scope="module")
def setting(small: Callable[..., list[str]]) -> list[str]:
    """Overrides with decay, so that there are two groups of parameters: what the optimizer holds must find its own."""
    keep = "{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints, init_args: {every_n_steps: 6, keep: 9}}"
    return small(
        trainer__max_steps=BEFORE + AFTER,
        trainer__callbacks=f"[{keep}]",
        model__weight_decay=0.1,
        model__lr_scale__mask_row=2,
    )


@pytest.fixture(scope="module")
def trained(dlm: Callable, setting: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`trained(way)`: a finished run."""

    @cache
    def run(way: str) -> Path:
        folder = tmp_path_factory.mktemp("runs")
        dlm("fit", "block_causal", *setting, *words(way), "--run", "whole", cwd=folder)
        return folder / "whole"

    return run


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp2", "one"),
        *(
            pytest.param(before, after, marks=pytest.mark.slow)
            for before, after in [
                ("one", "fsdp2"),
                ("one", "ddp"),
                ("one", "accumulating"),
                ("accumulating", "ddp"),
                ("ddp", "one"),
                ("ddp", "fsdp2"),
                ("fsdp2", "ddp"),
                ("fsdp2", "fsdp2 of one"),
                ("fsdp2 of one", "fsdp2"),
            ]
        ),
    ],
)
def test_the_next_20_losses_are_those_of_a_run_that_goes_on_as_before(before, after, trained, dlm, tmp_path):
    whole = trained(before)
    cut = shutil.copytree(whole, tmp_path / "cut")
    for path in (cut / "checkpoints").iterdir():
        if path.name != f"step={BEFORE}":
            shutil.rmtree(path)
    dlm("resume", cut, *words(after), cwd=tmp_path)
    for name in ("train/loss", "train/grad_norm", "val/nelbo"):
        went_on, resumed = rows(whole, name), rows(cut, name)
        assert resumed.keys() == went_on.keys(), name
        assert len([step for step in resumed if step >= BEFORE]) >= (AFTER if "train" in name else 3)
        error = 1e-4 if name == "train/grad_norm" else 1e-5  # the norm is a sum in another order
        assert list(resumed.values()) == pytest.approx(list(went_on.values()), rel=error), name
    stated = [manifest.verify(run / "checkpoints" / f"step={BEFORE + AFTER}") for run in (whole, cut)]
    assert stated[0]["consumed_samples"] == stated[1]["consumed_samples"] == 4 * (BEFORE + AFTER)
    assert [content["world_size"] for content in stated] == [
        WAYS[way].get("trainer.devices", 1) for way in (before, after)
    ]


def test_shards_put_together_are_the_checkpoint_of_one_process(trained, setting, typed, tmp_path):
    """Weights, and both moments of every parameter, of a run that FSDP2 and one process make alike."""
    sharded = checkpoint.whole(trained("fsdp2") / "checkpoints" / "step=6" / STATE)
    said = typed("fit", "block_causal", *setting, "--run", "alone", cwd=tmp_path)
    assert said.code == 0, said.err
    alone = torch.load(tmp_path / "alone" / "checkpoints" / "step=6" / STATE, weights_only=True)
    assert sharded["state_dict"].keys() == alone["state_dict"].keys()
    for name, value in alone["state_dict"].items():
        assert torch.allclose(sharded["state_dict"][name], value, rtol=1e-3, atol=1e-6), name
    ours, theirs = sharded["optimizer_states"][0], alone["optimizer_states"][0]
    assert [group["params"] for group in ours["param_groups"]] == [group["params"] for group in theirs["param_groups"]]
    assert ours["state"].keys() == theirs["state"].keys() and len(ours["param_groups"]) >= 2
    for number, values in theirs["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(ours["state"][number][name], values[name], rtol=1e-2, atol=1e-5), (number, name)
