"""Block-causal conversion after Efficient-DLM (arXiv 2512.14067): block-wise attention with clean context."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from dlm_lightning.module import Recipe
from dlm_lightning.noise import Noise
from dlm_lightning.schedule import BlockSchedule
from dlm_lightning.source import stated
from dlm_lightning.view import Pattern


class BlockCausal(Recipe):
    """Each noisy block sees itself in full and the context of all earlier blocks.

    Args:
        block_size: tokens per block, on the document's own positions; null takes what a diffusion source states.
        context: `clean`: a clean copy beside the noisy one, so that earlier blocks are read unmasked, as in decoding;
            `noisy`: one copy, earlier blocks are read as they are, masks included.
        context_rank: with clean context, whether the clean copy sees whole `block`s or is `causal` token by token,
            which an AR loss on it needs; prefill must follow the same rule.
        noise: which tokens are masked and what they weigh.
        block_schedule: block sizes of the first steps, growing or mixed; null trains by `block_size` throughout.
        **options: see `Recipe`.
    """

    def __init__(
        self,
        block_size: int | None = 16,
        context: Literal["clean", "noisy"] = "clean",
        context_rank: Literal["block", "causal"] = "block",
        noise: Noise = Noise(masking="tilted", weight="inverse_t"),
        block_schedule: BlockSchedule | None = None,
        **options: Any,
    ) -> None:
        size = block_size if block_size is not None else stated(options.get("source"), "block_size")
        super().__init__(Pattern(size, context, context_rank), noise=noise, **options)
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
