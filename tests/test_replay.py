"""A step that is made again is the run's own, bit for bit, and the run does not notice."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

EVERY_2 = "[{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints, init_args: {every_n_steps: 2, keep: 9}}]"


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logged(run: Path, step: int) -> dict[str, float]:
    """The run's numbers of a step, counted from 1."""
    with (run / "metrics.csv").open(newline="") as file:
        [row] = [row for row in csv.DictReader(file) if row["train/loss"] and int(row["step"]) == step - 1]
    return {name: float(row[name]) for name in ("train/loss", "train/grad_norm")}


def numbers(out: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"(train/\w+) (\S+):", out)}


def samples(out: str) -> list[list[int]]:
    """The table's rows: micro-batch, rank, epoch, place, row."""
    return [
        list(map(int, line.split())) for line in out.splitlines() if re.fullmatch(r"[\s\d]+", line) and line.strip()
    ]


@pytest.fixture
def run(typed, small, tmp_path) -> Path:
    """A finished run of 6 steps of two micro-batches, with the checkpoints of steps 2, 4 and 6."""
    more = {"trainer__accumulate_grad_batches": 2, "trainer__val_check_interval": 8, "trainer__callbacks": EVERY_2}
    said = typed("fit", "block_causal", *small(data__batch_size=2, **more), "--run", "run", cwd=tmp_path)
    assert said.code == 0, said.err
    return tmp_path / "run"


@pytest.mark.parametrize(("step", "start"), [(1, "the beginning"), (2, "the beginning"), (3, "step=2"), (6, "step=4")])
def test_a_step_is_the_runs_own_and_the_run_stays_as_it_is(typed, run, tmp_path, step, start):
    before = files(run)
    said = typed("replay", "run", "--step", step, cwd=tmp_path)
    assert said.code == 0, said.err
    assert said.err == ""
    assert files(run) == before
    assert said.out.startswith(f"step {step}, from {start}\n")
    assert numbers(said.out) == logged(run, step)
    assert said.out.count("equal to metrics.csv") == 2
    assert "  finite\n" in said.out
    found = samples(said.out)
    assert [sample[:4] for sample in found] == [[n // 2, 0, 0, 4 * (step - 1) + n] for n in range(4)]


def test_another_number_than_the_runs_is_said(typed, run, tmp_path):
    table = (run / "metrics.csv").read_text()
    mine = logged(run, 4)["train/loss"]
    (run / "metrics.csv").write_text(table.replace(str(mine), str(mine + 0.25)))
    assert logged(run, 4)["train/loss"] == mine + 0.25
    out = typed("replay", "run", "--step", 4, cwd=tmp_path).out
    assert f"differs from metrics.csv, which has {mine + 0.25}, by 0.25" in out
    assert out.count("equal to metrics.csv") == 1
    (run / "metrics.csv").unlink()
    assert typed("replay", "run", "--step", 4, cwd=tmp_path).out.count("metrics.csv has no row of this step") == 2


def test_a_damaged_checkpoint_is_passed_over(typed, run, tmp_path):
    (run / "checkpoints" / "step=4" / "state.ckpt").write_bytes(b"")
    said = typed("replay", "run", "--step", 6, cwd=tmp_path)
    assert said.out.startswith("step 6, from step=2\n")
    assert numbers(said.out) == logged(run, 6)


def test_a_run_without_checkpoints_that_starts_from_random_weights(typed, small, tmp_path):
    words = small(model__pretrained="false", trainer__callbacks="[]")
    assert typed("fit", "block_causal", *words, "--run", "run", cwd=tmp_path).code == 0
    said = typed("replay", "run", "--step", 3, cwd=tmp_path)
    assert said.out.startswith("step 3, from the beginning\n")
    assert numbers(said.out) == logged(tmp_path / "run", 3)


def test_the_global_batch_stays_that_of_the_run(typed, run, tmp_path):
    said = typed("replay", "run", "--step", 2, "trainer.accumulate_grad_batches=1", cwd=tmp_path)
    assert said.code == 0, said.err
    assert numbers(said.out) == pytest.approx(logged(run, 2), rel=1e-5)
    assert [sample[0] for sample in samples(said.out)] == [0] * 4


@pytest.mark.parametrize("step", [0, -1, 7])
def test_a_step_that_the_run_does_not_have_is_refused(refused, run, tmp_path, step):
    message = refused("replay", "run", f"--step={step}", cwd=tmp_path)
    assert message == f"--step must be one of the run's steps, 1 to 6, not {step}"


def test_what_is_no_run_is_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty is not a run folder" in refused("replay", "empty", "--step=1", cwd=tmp_path)


def test_a_batch_that_does_not_divide_is_refused(refused, run, tmp_path):
    message = refused("replay", "run", "--step=3", "trainer.accumulate_grad_batches=3", cwd=tmp_path)
    assert message == "the run's batch of 4 samples does not divide into 3 micro-batches"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_step_of_two_ranks_on_one(dlm, typed, small, tmp_path, strategy):
    two = {"data__batch_size": 2, "trainer__devices": 2, "trainer__strategy": strategy}
    dlm("fit", "block_causal", *small(**two, trainer__callbacks=EVERY_2), "--run", "run", cwd=tmp_path)
    before = files(tmp_path / "run")
    for step in (2, 5):
        said = typed("replay", "run", "--step", step, "trainer.devices=1", "trainer.strategy=auto", cwd=tmp_path)
        assert said.code == 0, said.err
        assert numbers(said.out) == pytest.approx(logged(tmp_path / "run", step), rel=1e-5)
        assert [sample[3] for sample in samples(said.out)] == [4 * (step - 1) + n for n in range(4)]
    assert files(tmp_path / "run") == before


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_step_of_two_ranks_on_two(dlm, typed, small, tmp_path, strategy):
    two = {"data__batch_size": 2, "trainer__devices": 2, "trainer__strategy": strategy}
    dlm("fit", "block_causal", *small(**two, trainer__callbacks=EVERY_2), "--run", "run", cwd=tmp_path)
    done = dlm("replay", "run", "--step", 4, cwd=tmp_path)
    assert done.stdout.count("step 4, from step=2") == 1
    assert numbers(done.stdout) == logged(tmp_path / "run", 4)
    assert done.stdout.count("equal to metrics.csv") == 2
    assert [sample[:2] for sample in samples(done.stdout)] == [[0, 0], [0, 0], [0, 1], [0, 1]]
