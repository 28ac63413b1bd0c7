"""Block sizes over the steps: from small to large, or mixed, before the block size of the finished model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dlm_lightning.noise import raw
from dlm_lightning.view import Pattern

STREAM = 8  # of the noise that mixes; the data module's are below


@dataclass(frozen=True)
class BlockSchedule:
    """The block size of each training step up to `steps`; afterwards, and in validation, it is the recipe's own.

    Args:
        sizes: block sizes; `growing` takes them in order, so they ascend.
        steps: optimizer steps that the schedule lasts.
        order: `growing`: each size for an equal share of the steps. `mixed`: one is drawn at each step.
    """

    sizes: tuple[int, ...]
    steps: int
    order: Literal["growing", "mixed"] = "growing"

    def __post_init__(self):
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"block_schedule.sizes must be block sizes of at least 1, not {list(self.sizes)}")
        if self.order == "growing" and list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"block_schedule.sizes must ascend where the order is growing, not {list(self.sizes)}")
        if self.steps < len(self.sizes):
            raise ValueError(f"block_schedule.steps must be at least the {len(self.sizes)} sizes, not {self.steps}")

    def size(self, step: int, seed: int) -> int | None:
        """The block size of a step, a pure function of step and seed; None once the schedule is over."""
        if step >= self.steps:
            return None
        count = len(self.sizes)
        if self.order == "growing":
            return self.sizes[step * count // self.steps]
        return self.sizes[int(raw(seed, STREAM, step, count=1)[0] % count)]

    def pattern(self, pattern: Pattern, step: int, seed: int) -> Pattern:
        """The pattern of a training step: the finished model's, with the step's block size."""
        return replace(pattern, block_size=self.size(step, seed) or pattern.block_size)
