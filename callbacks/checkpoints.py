"""Keeps the newest checkpoints of a run, and leaves after a signal with the last step saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from dlm_lightning import interruption, saving
from dlm_lightning.module import Recipe
from dlm_lightning.transfer import Fetched


class Checkpoints(L.pytorch.callbacks.Checkpoint):
    """Saves every so many optimizer steps and after the last one, whole or not at all, in `<run>/checkpoints`.

    After SIGTERM, SIGUSR1 or Ctrl-C to any rank the optimizer step under way is the last for now, or where there are
    several ranks the one after it: all ranks log it, make the validation that is due, save it, and leave by SystemExit
    with the signal's exit code. A save that fails ends the run, and the checkpoints before it stay.

    Args:
        every_n_steps: optimizer steps between checkpoints.
        keep: how many complete ones to keep.
    """

    def __init__(self, every_n_steps: int = 100, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 1:
            raise ValueError("Checkpoints: every_n_steps and keep must be at least 1")
        self.every_n_steps, self.keep = every_n_steps, keep
        self._step = 0  # the last one that was looked at
        self._asked: Fetched | None = None  # after that step, of any rank

    def on_train_start(self, trainer: L.Trainer, recipe: Recipe) -> None:
        self._step, self._asked = trainer.global_step, None
        interruption.defer()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Not at `on_train_batch_end`: Lightning logs and validates a step after that, and a resume does neither."""
        step = trainer.global_step
        if step == self._step:  # between micro-batches, or where the run has begun
            return
        self._step = step
        leave = self._leave(trainer)
        if leave or step % self.every_n_steps == 0:
            self._save(trainer)
        if leave:
            raise SystemExit(leave)

    def _leave(self, trainer: L.Trainer) -> int:
        """The exit code to leave with, 0 to go on. Ranks agree on it in the course of a step, so that none waits."""
        if trainer.world_size == 1:
            return interruption.asked()
        before, code = self._asked, torch.full((), interruption.asked(), device=trainer.strategy.root_device)
        dist.all_reduce(code, dist.ReduceOp.MAX)
        self._asked = Fetched(code)
        return int(before.read()) if before else 0

    def on_train_end(self, trainer: L.Trainer, recipe: Recipe) -> None:
        if trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:  # what a resume keeps of their rows is what lies before the checkpoint
            logger.save()
        saving.write(trainer, Path(trainer.default_root_dir), self.keep)
