"""Full bidirectional conversion, the way of DiffuLLaMA and Dream: the whole noisy document attends to itself."""

from __future__ import annotations

from typing import Any, Literal

from dlm_lightning.module import Recipe
from dlm_lightning.noise import Noise
from dlm_lightning.view import Pattern


class FullBidirectional(Recipe):
    """One noisy copy, every token sees its whole document: rank = 0.

    Args:
        shift: `next_token` keeps the source's way of predicting (DiffuLLaMA, Dream); `none` reads each masked token at
            its own position; null takes what a diffusion source states.
        noise: which tokens are masked and what they weigh; t is drawn for each document.
        annealing_steps: causal annealing: over so many steps attention goes from causal to full, by blocks that grow
            from 1 token to the row's length; 0 starts with full attention.
        **options: see `Recipe`.
    """

    def __init__(
        self,
        shift: Literal["none", "next_token"] | None = "next_token",
        noise: Noise = Noise(masking="bernoulli", weight="inverse_p", t_per="document"),
        annealing_steps: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(Pattern(block_size=None), shift=shift, first_token="clean", noise=noise, **options)
        if annealing_steps < 0:
            raise ValueError(f"model.annealing_steps must be at least 0, not {annealing_steps}")
        self.annealing_steps = annealing_steps

    @property
    def train_pattern(self) -> Pattern:
        step = self.trainer.global_step
        if step >= self.annealing_steps:
            return self.pattern
        length = self.trainer.datamodule.row_length
        return Pattern(block_size=round(length ** (step / self.annealing_steps)))

    @property
    def phases(self) -> dict[str, int]:
        return super().phases | {"model.annealing_steps": self.annealing_steps}

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"model.annealing_steps": self.annealing_steps}
