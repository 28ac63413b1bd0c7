"""`dlm summary`: its tables say what the run's own files say."""

from __future__ import annotations

import csv

import pytest

from dlm_lightning.callbacks.weight_drift import last
from dlm_lightning.drift import METRICS
from dlm_lightning.summary import MASKED, MEANING, PROMPT

CALLBACKS = (
    "[{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints}, "
    "{class_path: dlm_lightning.callbacks.weight_drift.WeightDrift, init_args: {every_n_steps: 2}}]"
)


@pytest.fixture
def run(typed, small, tmp_path):
    """A finished `block_causal` of 6 steps, validated after 4 and 6, its drift measured after 2, 4 and 6."""
    said = typed("fit", "block_causal", *small(trainer__callbacks=CALLBACKS), "--run", "run", cwd=tmp_path)
    assert said.code == 0, said.err
    return tmp_path / "run"


def tables(text: str) -> dict[str, list[str]]:
    """The rows of all tables, by their first cell."""
    rows = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines() if "│" in line]
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0]: row[1:] for row in rows}


def test_the_tables_are_those_of_the_runs_files(run, typed, tmp_path):
    said = typed("summary", "run", cwd=tmp_path, env={"COLUMNS": "300"})
    assert said.code == 0, said.err
    rows = tables(said.out)
    with (run / "metrics.csv").open(newline="") as file:
        measured = [row for row in csv.DictReader(file) if row["val/nelbo"]]
    assert len(measured) == 3
    for name, meaning in MEANING.items():
        first, middle, after = (f"{float(row[f'val/{name}']):.3f}" for row in measured)
        assert rows[meaning] == [first, after]
        assert len({first, middle, after}) == 3
    step, groups = last(run / "drift" / "drift.parquet")
    assert step == 6 and "drift from the AR source, step 6" in said.out
    assert {"q", "down", "norm", "embedding"} <= groups.keys()
    for group, values in groups.items():
        assert rows[group] == [f"{values[name]:.3g}" if name in values else "" for name in METRICS]
    for name in ("config.yaml", "metrics.csv", "tensorboard", "checkpoints", "drift"):
        assert name in rows
    assert not {"model", "samples", "samples.txt"} & rows.keys()


def test_a_continuation_begins_with_its_prompt_and_is_filled_in(finished, typed, tmp_path):
    said = typed("summary", finished, cwd=tmp_path, env={"COLUMNS": "300"})
    assert said.code == 0, said.err
    assert "drift from the AR source" not in said.out  # which this run did not measure
    canvases = said.out.split("where everything lies")[0].split("  after forward ")[1:]
    assert 2 <= len(canvases) <= 8
    forwards, texts = zip(*(canvas.split("\n", 1) for canvas in canvases), strict=True)
    assert [int(number) for number in forwards] == sorted({int(number) for number in forwards})
    first, second = PROMPT.split("\n")
    for text in texts:
        assert text.startswith(f"    {first}\n    {second}"), text
    left = [text.count(MASKED) for text in texts]
    assert left[0] > 0 and left[-1] == 0
