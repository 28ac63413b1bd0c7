"""Tokens per second, by each of the three ways to count them, and the share of the device's peak that is used."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
import torch

from dlm_lightning.flops import needed
from dlm_lightning.module import Recipe
from dlm_lightning.pattern_flops import forward_flops
from dlm_lightning.peak_flops import peak_flops
from dlm_lightning.transfer import Fetched
from dlm_lightning.view import Batch

KINDS = ("data", "scored", "forward")


class Throughput(L.Callback):
    """Logs tokens per second over all ranks since the last row of metrics; it holds no state.

    speed/data_tokens_per_second: tokens of the corpus, padding left out; `tokens/s` in the progress bar.
    speed/scored_tokens_per_second: terms of the loss.
    speed/forward_tokens_per_second: tokens that the network computed, those of every copy and of padding.
    speed/mfu: FLOPs that the pattern needs (`pattern_flops`) over the peak of the devices, where it is known.
    They are those of the first micro-batch, for which it makes one forward pass more.
    speed/peak_memory_gib: the most that this rank has held so far, of its GPU, or else of its process.

    The clock stands still from a validation or a checkpoint to the next batch. Numbers are logged where they are, on
    the device or on the host, so that nothing waits; the progress bar has those of the step before.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, Any] = dict.fromkeys(KINDS, 0.0)
        self._steps = self._step = 0
        self._seconds = 0.0
        self._since: float | None = None
        self._before: Fetched | None = None  # for the progress bar, of the last step
        self._peak: float | None = None
        self._flops = 0.0  # of a micro-batch, 0 before the first

    def on_train_start(self, trainer: L.Trainer, recipe: Recipe) -> None:
        self._clear(trainer.global_step)
        self._since, self._before, self._flops = None, None, 0.0
        self._peak = peak_flops(trainer.strategy.root_device, trainer.precision)

    def on_train_batch_start(self, trainer: L.Trainer, recipe: Recipe, batch: Batch, *_: Any) -> None:
        if self._peak and not self._flops:
            view, scored = recipe.shown(batch, recipe.train_pattern)[1:]
            with trainer.precision_plugin.forward_context():
                forward = forward_flops(recipe.denoiser, view.to(recipe.device), scored.to(recipe.device))
            self._flops = needed(forward, recipe.denoiser)
        if self._since is None:
            self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, recipe: Recipe, *_: Any) -> None:
        if trainer.global_step == self._step:  # between micro-batches
            return
        self._step = trainer.global_step
        self._steps += 1
        for kind in KINDS:
            self._tokens[kind] = self._tokens[kind] + getattr(recipe.tally, kind)
        self._stop()
        self._since = time.perf_counter()
        for kind in KINDS:
            recipe.log(f"speed/{kind}_tokens_per_second", self._tokens[kind] / self._seconds)
        if self._before is not None:  # a bar is drawn after every step, and narrow
            recipe.log("tokens/s", self._before.read(), prog_bar=True, logger=False)
        self._before = Fetched(self._tokens["data"] / self._seconds)
        if self._peak:
            flops = self._flops * self._steps * trainer.accumulate_grad_batches
            mfu = flops / self._seconds / self._peak  # of one rank: all do the same
            recipe.log("speed/mfu", torch.tensor(mfu))
        recipe.log("speed/peak_memory_gib", torch.tensor(peak_memory(trainer.strategy.root_device) / 2**30))
        if trainer.log_every_n_steps and self._step % trainer.log_every_n_steps == 0:
            self._clear(self._step)

    def on_validation_start(self, *_: Any) -> None:
        self._stop()

    def on_save_checkpoint(self, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
        self._since = None

    def _clear(self, step: int) -> None:
        self._tokens = dict.fromkeys(KINDS, 0.0)
        self._steps, self._step, self._seconds = 0, step, 0.0


def peak_memory(device: torch.device) -> float:
    """The most bytes that were held so far, on a GPU by torch, or else by this process; nan where nobody says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
