"""Complementary-mask conversion after Fast-dLLM v2 (arXiv 2509.26328): two noisy copies that share out the tokens."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from dlm_lightning.module import Recipe
from dlm_lightning.noise import Masked, Noise
from dlm_lightning.schedule import BlockSchedule
from dlm_lightning.source import stated
from dlm_lightning.view import Batch, Pattern


class ComplementaryMask(Recipe):
    """Two noisy copies, the second masked exactly where the first is not, and one clean copy that both read.

    Every maskable token is scored once per step, so weights are 1; the row costs 3L tokens where two separate
    [noisy; clean] passes cost 4L.

    Args:
        block_size: tokens per block, on the document's own positions; null takes what a diffusion source states.
        context_rank: whether the clean copy sees whole `block`s or is `causal` token by token, which an AR loss needs.
        shift: `next_token`, as in the paper, or `none`; null takes what a diffusion source states.
        noise: the masking of the first copy; the second takes all other maskable tokens.
        block_schedule: block sizes of the first steps, growing or mixed; null trains by `block_size` throughout.
        **options: see `Recipe`.
    """

    maskings = ("complementary",)
    mirrored = False  # a pair's second copy already is the mirror image of the first

    def __init__(
        self,
        block_size: int | None = 16,
        context_rank: Literal["block", "causal"] = "block",
        shift: Literal["none", "next_token"] | None = "next_token",
        noise: Noise = Noise(masking="complementary", weight="one"),
        block_schedule: BlockSchedule | None = None,
        **options: Any,
    ) -> None:
        size = block_size if block_size is not None else stated(options.get("source"), "block_size")
        super().__init__(Pattern(size, "clean", context_rank), shift=shift, noise=noise, **options)
        self.block_schedule = block_schedule

    @property
    def train_pattern(self) -> Pattern:
        if self.block_schedule is None:
            return self.pattern
        return self.block_schedule.pattern(self.pattern, self.trainer.global_step, self.trainer.datamodule.seed)

    @property
    def phases(self) -> dict[str, int]:
        return super().phases | ({"model.block_schedule": self.block_schedule.steps} if self.block_schedule else {})

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"model.block_schedule": self.block_schedule and asdict(self.block_schedule)}

    def corrupt(self, batch: Batch, pattern: Pattern) -> list[Masked]:
        first = self.draw(self.noise, batch, pattern)
        rest_BL = batch.maskable_BL & ~first.mask_BL
        return [first, Masked(rest_BL, rest_BL.float())]
