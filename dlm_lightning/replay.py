"""`dlm replay`: one step of a run made again, from its checkpoint and the same samples."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from dlm_lightning import checkpoint, nonfinite, runs
from dlm_lightning.data.stream import Sample
from dlm_lightning.parsing import quiet
from dlm_lightning.reopening import reopen
from dlm_lightning.training import part

ALONE = [  # nothing but the steps themselves
    f"--trainer.{setting}"
    for setting in (
        *("logger=false", "callbacks=[]", "enable_checkpointing=false", "enable_progress_bar=false"),
        *("limit_val_batches=0", "min_steps=null", "min_epochs=null"),
    )
]


@dataclass(frozen=True)
class Replay:
    """What a step gave: its numbers by the metrics' names, the parameters whose gradient is not finite, its samples.

    start: the checkpoint that the steps before it began from, None for the run's beginning. logged: what metrics.csv
    says of the same numbers; empty if it has no row of the step.
    """

    step: int
    start: Path | None
    numbers: dict[str, float]
    broken: list[str]
    samples: list[Sample]
    logged: dict[str, float]


def show(folder: str, step: int, overrides: Sequence[str]) -> None:
    """Make a step again and print what it gave."""
    done = replay(folder, step, overrides)
    if not runs.is_first_process():
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"step {done.step}, from {done.start.name if done.start else 'the beginning'}")
    for name, number in done.numbers.items():
        console.print(f"  {name} {number}: {compared(number, done.logged.get(name))}")
    finite = all(map(math.isfinite, done.numbers.values()))
    console.print(f"  {'finite' if finite else 'not finite; parameters whose gradient is not:'}")
    for name in done.broken:
        console.print(f"    {name}")
    table = Table(*(field.replace("_", "-") for field in Sample._fields), box=None, header_style="dim")
    for sample in done.samples:
        table.add_row(*map(str, sample))
    console.print(table)


def compared(number: float, logged: float | None) -> str:
    """In words, how a number stands to that of the run."""
    if logged is None:
        return "metrics.csv has no row of this step"
    if number == logged or (math.isnan(number) and math.isnan(logged)):
        return "equal to metrics.csv"
    return f"differs from metrics.csv, which has {logged}, by {abs(number - logged):.2g}"


def replay(folder: str, step: int, overrides: Sequence[str] = ()) -> Replay:
    """Make a step of a run again, after those since the newest checkpoint before it; the run folder stays as it is.

    The global batch is the run's on any number of ranks. Steps that are not finite change nothing, as in a run that
    skips them.
    """
    quiet()
    runs.check_trained(folder)
    logging.getLogger("dlm_lightning").setLevel(logging.ERROR)  # the run has said all this
    with TemporaryDirectory() as scratch:
        run, cli = reopen(folder, *overrides, *ALONE, into=scratch)
        recipe, data = cli.model, cli.datamodule
        trainer: Any = cli.trainer
        if not 1 <= step <= trainer.max_steps:
            raise ValueError(f"--step must be one of the run's steps, 1 to {trainer.max_steps}, not {step}")
        start, batch = beginning(run, step)
        if batch:
            data.batch_size = _share(batch, trainer.world_size * trainer.accumulate_grad_batches)
        recipe.nonfinite = "skip"
        last = _Last(step)
        trainer.callbacks.append(last)
        state = str(start / checkpoint.STATE) if start else None
        trainer.fit(recipe, data, ckpt_path=state, weights_only=True)
        part()
        note = nonfinite.file(Path(scratch), step)
        broken = json.loads(note.read_text())["parameters"] if note.is_file() else []
    return Replay(step, start, last.numbers, broken, data.samples_of(step), _logged(run, step))


def beginning(run: Path, step: int) -> tuple[Path | None, int | None]:
    """The newest complete checkpoint before a step, and the global batch size that the run's checkpoints state."""
    start = _newest(run, before=step)
    some = start or _newest(run)
    return start, checkpoint.load(some / checkpoint.STATE)[checkpoint.FACTS]["global batch size"] if some else None


def _newest(run: Path, before: int | None = None) -> Path | None:
    try:
        return checkpoint.newest(run, before)
    except ValueError:  # none is complete; then the beginning will do
        return None


def _share(batch: int, parts: int) -> int:
    if batch % parts:
        raise ValueError(f"the run's batch of {batch} samples does not divide into {parts} micro-batches")
    return batch // parts


class _Last(L.Callback):
    """Ends the run after a step and keeps what the step logged."""

    def __init__(self, step: int) -> None:
        self._step = step
        self.numbers: dict[str, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            logged = trainer.callback_metrics
            self.numbers = {name: logged[name].item() for name in ("train/loss", "train/grad_norm")}
            trainer.should_stop = True


def _logged(run: Path, step: int) -> dict[str, float]:
    """The run's own numbers of a step; metrics.csv counts from 0."""
    try:
        with (run / runs.METRICS).open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["step"] == str(step - 1) and row.get("train/loss")]
    except FileNotFoundError:
        return {}
    return {name: float(value) for row in rows for name, value in row.items() if name.startswith("train/") and value}
