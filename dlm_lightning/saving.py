"""Saving a checkpoint: whole or not at all, whatever fails on whichever rank, and the newest few are kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.distributed.checkpoint.api import CheckpointException

from dlm_lightning import manifest
from dlm_lightning.checkpoint import FACTS, FOLDER, STATE, by_step


def write(trainer: L.Trainer, run: Path, keep: int) -> Path:
    """Save the trainer's step, all ranks together, and keep the newest `keep` complete checkpoints.

    Written beside, flushed to disk, completed by the manifest, renamed. If any rank fails the first one raises OSError
    and the others SystemExit(1); what was there before is still there.
    """
    folder, step = run / FOLDER, trainer.global_step
    whole, beside = folder / f"step={step}", folder / f".step={step}"
    try:
        _save(trainer, beside)
        with _together(trainer):
            if trainer.is_global_zero:
                _replace(whole, beside)
                complete = [path for _, path in by_step(folder, at_most=step) if (path / manifest.NAME).is_file()]
                for path in complete[keep:]:
                    path.rename(path.with_name(f".{path.name}"))
                _clear(folder)
    except OSError as error:
        if not trainer.is_global_zero:
            raise SystemExit(1) from error
        _clear(folder)
        raise OSError(f"{whole} could not be saved: {error}") from error
    return whole


def _save(trainer: L.Trainer, folder: Path) -> None:
    """Write a complete checkpoint, in a folder that nobody takes for one."""
    with _together(trainer):  # first: a recipe may refuse
        content: Any = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        facts, step = content[FACTS], content["global_step"]
    with _together(trainer):
        if trainer.is_global_zero:
            _clear(folder.parent)
            folder.mkdir(parents=True)
    with _together(trainer):
        trainer.strategy.save_checkpoint(content, folder / STATE)
    files: list[manifest.Files] = [{}] * trainer.world_size
    with _together(trainer):
        files[trainer.global_rank] = manifest.describe(folder, trainer.global_rank, trainer.world_size)
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(files, files[trainer.global_rank])
    with _together(trainer):
        if trainer.is_global_zero:
            manifest.write(
                folder,
                {name: measured for part in files for name, measured in part.items()},
                step=step,
                consumed_samples=step * facts["global batch size"],
                world_size=trainer.world_size,
                strategy=type(trainer.strategy).__name__,
                recipe=facts["recipe"],
                source=facts["model.source"],
            )


def _replace(whole: Path, beside: Path) -> None:
    """Give a complete checkpoint its name; one that has it is damaged, or the run would not have come here again."""
    if whole.exists():
        whole.rename(whole.with_name(f".{whole.name}.before"))
    beside.rename(whole)
    manifest.flush(whole.parent)


@contextmanager
def _together(trainer: L.Trainer) -> Iterator[None]:
    """Raise OSError on all ranks if the body fails on one, so that none waits for another that has given up."""
    why = None
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        failures = error.failures.values() if isinstance(error, CheckpointException) else ()
        why = _reason(next((failed for failed, _ in failures), error))
    said = [why] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(said, why)
    if reason := next(filter(None, said), None):
        raise OSError(reason)


def _reason(error: BaseException | None) -> str:
    """The system's own words, which torch hides behind an error of its own."""
    last = error
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        last, error = error, error.__cause__ or error.__context__
    text = str(last).split("\n")[0]
    return f"a file cannot be written to its end, as on a full disk ({text})" if "inline_container" in text else text


def _clear(folder: Path) -> None:
    """Remove what is unfinished or given up."""
    for path in folder.glob(".step=*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
