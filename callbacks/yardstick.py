"""The yardstick by which patterns are compared: the block-wise bound at the same block sizes for all of them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from dlm_lightning.likelihood import FUTURES, Blocks, Bound, Future, bound, redrawn
from dlm_lightning.module import Recipe
from dlm_lightning.tally import LEVELS, NAMES
from dlm_lightning.view import AUTOREGRESSIVE, Batch

STREAM = 4  # of the noise; training, validation and the data's order have others


class Yardstick(L.Callback):
    """Measures the block-wise bound at each validation, in nats per token, with the same noise for every pattern.

    Forward passes are in the trainer's precision.

    bound/<future>/<size>: blocks of `size` tokens behind a clean prefix (see `likelihood.Blocks`); an autoregressive
    model has size 1 alone, its exact likelihood; one without blocks the masked future alone, as decoders show it.
    profile/position/<n>: the bound at `profile_size`, future masked, per token at place n of its block, from 0.
    profile/level/<share>: the unweighted −log p of masked tokens by the share of their block that is masked.

    Where the model's own block (or document) holds several blocks of a size, a pass shows one of them; there are as
    many passes as it holds, each with noise of its own, up to `passes`, which then share out the blocks among them.

    Args:
        sizes: tokens per block; what does not divide the model's own block is left out where the future is masked.
        futures: `masked`, `absent` or both.
        passes: the most passes of a bound; a model without blocks takes as many.
        profile_size: tokens per block of the profile; one of `sizes`.
        seed: of the noise.
    """

    def __init__(
        self,
        sizes: tuple[int, ...] = (1, 4, 16, 32),
        futures: tuple[Future, ...] = FUTURES,
        passes: int = 16,
        profile_size: int = 16,
        seed: int = 0,
    ) -> None:
        if passes < 1:
            raise ValueError(f"Yardstick.passes must be at least 1, not {passes}")
        if profile_size not in sizes:
            raise ValueError(f"Yardstick.profile_size must be one of {', '.join(map(str, sizes))}, not {profile_size}")
        self.blocks = [Blocks(size, future) for future in futures for size in sizes]
        self.passes, self.profile, self.seed = passes, Blocks(profile_size), seed
        self._metrics: dict[str, MeanMetric] = {}

    def on_validation_epoch_start(self, trainer: L.Trainer, recipe: Recipe) -> None:
        own = recipe.pattern.block_size
        self._measured: dict[Blocks, list[str]] = {}  # and the names of what each gives
        for blocks in self.blocks:
            if recipe.pattern == AUTOREGRESSIVE and blocks.size > 1:
                continue
            if own is None and blocks.future == "absent":
                continue
            if own and blocks.future == "masked" and own % min(blocks.size, own):
                continue
            same = Blocks(blocks.size) if own and blocks.size >= own else blocks
            self._measured.setdefault(same, []).append(f"bound/{blocks.future}/{blocks.size}")
        names = [name for of_blocks in self._measured.values() for name in of_blocks]
        if self.profile in self._measured:
            names += [f"profile/position/{place}" for place in range(self.profile.size)]
            names += [f"profile/level/{share}" for share in NAMES]
        # on every rank, also where it has nothing to add
        self._metrics = {name: MeanMetric(nan_strategy="ignore").to(recipe.device) for name in names}

    def on_validation_batch_end(self, trainer: L.Trainer, recipe: Recipe, _: Any, batch: Batch, *__: Any) -> None:
        own = recipe.pattern.block_size
        noise = [redrawn(batch, self.seed, STREAM, n) for n in range(self.passes)]
        choice_BL = noise[0][1]
        for blocks, names in self._measured.items():
            held = own // blocks.size if own and blocks.future == "masked" else 1 if own else None
            count = self.passes if held is None else min(self.passes, max(1, held))  # the same for all ranks
            whole = held is not None and count >= held  # one block of each after another, which add up
            for n, (noisy, _) in enumerate(noise[:count]):
                with trainer.precision_plugin.forward_context():
                    done = bound(recipe.denoiser, noisy, blocks, n if whole else (n + choice_BL) / count)
                share_BL = done.share_BL * (count if whole else 1)
                for name in names:
                    self._add(name, share_BL, batch.maskable_BL)
                if blocks == self.profile:
                    self._profile(done, share_BL, batch)

    def _profile(self, done: Bound, share_BL: Tensor, batch: Batch) -> None:
        place_BL = batch.position_BL % self.profile.size
        for place in range(self.profile.size):
            self._add(f"profile/position/{place}", share_BL, batch.maskable_BL & (place_BL == place))
        part_BL = (done.level_BL * LEVELS - 1e-6).floor()
        for part, share in enumerate(NAMES):
            self._add(f"profile/level/{share}", done.nll_BL, (done.level_BL > 0) & (part_BL == part))

    def _add(self, name: str, value_BL: Tensor, where_BL: Tensor) -> None:
        count = where_BL.sum()
        self._metrics[name].update(value_BL[where_BL].sum() / count.clamp(min=1), weight=count)

    def on_validation_epoch_end(self, trainer: L.Trainer, recipe: Recipe) -> None:
        for name, metric in self._metrics.items():
            value = metric.compute()
            if metric.weight > 0 and torch.isfinite(value):
                recipe.log(name, value)
