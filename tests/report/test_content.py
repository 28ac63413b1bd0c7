"""Runs as they lie on disk, and which of them are one arm."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlm_lightning.report.content import GREY, Run, arms_of, expand, flat
from dlm_lightning.report.tables import Table, differing, spread


def run(recipe: str, seed: int, block_size: int | None = 16, **config) -> Run:
    pattern = {"block_size": block_size, "context": "clean", "context_rank": "block", "shift": "none"}
    values = {"data.seed": seed, "seed_everything": seed, "trainer.default_root_dir": f"/{seed}", **config}
    return Run(
        Path(f"{recipe}-{seed}"), recipe, [recipe], values, {"pattern": pattern, "step": 1, "asked": {"overrides": []}}
    )


def test_runs_that_differ_in_seed_and_place_are_one_arm():
    arms = arms_of([run("a", 1, **{"model.lr": 1}), run("b", 0, **{"model.lr": 1}), run("a", 0, **{"model.lr": 1})])
    assert [arm.title for arm in arms] == ["a", "b"]
    assert [own.seed for own in arms[0].runs] == [0, 1]


def test_arms_of_one_recipe_are_told_apart_by_what_differs():
    arms = arms_of([run("a", 0, **{"model.lr": 1, "model.x": 5}), run("a", 0, **{"model.lr": 2, "model.x": 5})])
    assert [arm.title for arm in arms] == ["a (lr=1)", "a (lr=2)"]
    assert [arm.differing for arm in arms] == [{"model.lr": 1}, {"model.lr": 2}]
    assert differing(arms).rows == [["model.lr", "1", "2"]]


def test_causal_arms_come_last_and_are_grey():
    arms = arms_of([run("control", 0, block_size=1), run("a", 0), run("b", 0, block_size=None)])
    assert [arm.title for arm in arms] == ["a", "b", "control"]
    assert arms[2].color == GREY and len({arm.color for arm in arms}) == 3
    assert [arm.label for arm in arms] == ["block 16, clean context", "whole document", "causal"]


def test_a_config_is_flat_without_init_args():
    config = {"model": {"class_path": "X", "init_args": {"noise": {"eps": 1}, "x": None}}, "seed": 0, "list": [1]}
    assert flat(config) == {"model.class_path": "X", "model.noise.eps": 1, "model.x": None, "seed": 0, "list": [1]}


def test_a_folder_without_runs_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        with pytest.raises(FileNotFoundError, match="neither a run folder nor a folder of runs"):
            expand([str(tmp_path / name)])


@pytest.mark.parametrize(
    "values, options, text",
    [
        ([], {}, "–"),
        ([1.23456], {}, "1.235"),
        ([2.0, 2.0], {}, "2.000"),
        ([1.0, 3.0], {"digits": 1}, "2.0 ± 1.4"),
        ([0.5, 0.7], {"digits": 0, "percent": True}, "60 ± 14%"),
        ([-1234.5], {"digits": 0}, "−1,234"),
    ],
)
def test_numbers_over_seeds(values, options, text):
    assert spread(values, **options) == text


def test_a_table_in_markdown():
    table = Table("T", ["a", "b"], [["x|y", "1"]], "N")
    assert table.markdown().splitlines() == ["### T", "", "N", "", "| a | b |", "|---|---|", "| x&#124;y | 1 |"]


def test_columns_that_hold_nothing_are_left_out():
    table = Table("T", ["a", "b", "c"], [["x", "–", "1"], ["y", "–", "–"]])
    assert table.pruned().head == ["a", "c"] and table.pruned().rows == [["x", "1"], ["y", "–"]]
    assert table.numbers == [False, True, True]
