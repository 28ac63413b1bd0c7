"""Which tokens a forward shows, and which are only looked at in the cache.

Shapes: B rows, L tokens of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dlm_lightning.decode.canvas import Canvas
from dlm_lightning.denoiser import Denoiser
from dlm_lightning.view import AUTOREGRESSIVE, Pattern, sees


class Reuse(ABC):
    """Which tokens a forward shows.

    whole_blocks: whether these are whole blocks, so that each sees all slots up to the end of its own.
    """

    whole_blocks: ClassVar[bool] = False

    def check(self, denoiser: Denoiser, pattern: Pattern) -> None:  # noqa: B027  # some have nothing to refuse
        """Raise ValueError, naming the reason, for a model that cannot be decoded so."""

    def pattern(self, pattern: Pattern) -> Pattern:
        """The pattern to decode with, for a model of this one."""
        return pattern

    @abstractmethod
    def shown(self, canvas: Canvas, candidates_BL: Tensor, shifted: bool) -> Tensor:
        """The tokens that the next forward shows, bool [B, L]; it may fill in the candidates.

        `shifted`: whether a mask is read at the position before it.
        """


@dataclass(frozen=True)
class Nothing(Reuse):
    """Shows all that can be seen: exact for every pattern, and nothing is saved."""

    def shown(self, canvas: Canvas, candidates_BL: Tensor, shifted: bool) -> Tensor:
        return canvas.position_L < canvas.reach_B[:, None]


@dataclass(frozen=True)
class Prefix(Reuse):
    """Shows a block, and once more the block before it when that is full: exact.

    The forward that keeps a full block is the first one of the block after it.
    """

    whole_blocks = True

    def check(self, denoiser: Denoiser, pattern: Pattern) -> None:
        if pattern.block_size is None:
            raise ValueError("the prefix cache needs blocks, and this model has none: every token sees every other")
        _check_predicate(denoiser)

    def shown(self, canvas: Canvas, candidates_BL: Tensor, shifted: bool) -> Tensor:
        return canvas.span(canvas.final_B, canvas.reach_B)


@dataclass(frozen=True)
class SubBlock(Prefix):
    """Shows one part of a block (Fast-dLLM v2's hierarchical cache); the rest of the block is as old as the part.

    The whole block is shown when it begins, and as long as the first token of a part is a mask.
    """

    whole_blocks = False

    def shown(self, canvas: Canvas, candidates_BL: Tensor, shifted: bool) -> Tensor:
        shown_BL = super().shown(canvas, candidates_BL, shifted)
        fresh_B = (canvas.span(canvas.start_B, canvas.stop_B) & ~canvas.shown_BL).any(1)
        first_B = canvas.masked_BL.gather(1, canvas.part_B.clamp(max=canvas.ids_BL.shape[1] - 1)[:, None]).squeeze(1)
        whole_B = fresh_B | first_B
        return shown_BL & (whole_B[:, None] | canvas.span(canvas.part_B, canvas.until_B))


@dataclass(frozen=True)
class Delayed(Reuse):
    """Shows what is a mask or became a token in the forward before (dKV-Cache-Decode): an approximation.

    Args:
        refresh: everything is shown in every so many forwards of a block, and in its first two.
    """

    refresh: int = 8

    def __post_init__(self) -> None:
        _check_refresh(self.refresh)

    def check(self, denoiser: Denoiser, pattern: Pattern) -> None:
        _check_predicate(denoiser)

    def shown(self, canvas: Canvas, candidates_BL: Tensor, shifted: bool) -> Tensor:
        settled_BL = canvas.clean_BL
        if shifted:  # the next token is read here
            settled_BL = settled_BL & ~canvas.masked_BL.roll(-1, 1)
        all_B = (canvas.forwards_B % self.refresh == 0) | (canvas.forwards_B < 2)
        return _seen(canvas) & (~settled_BL | all_B[:, None] | _outside(canvas))


@dataclass(frozen=True)
class Greedy(Reuse):
    """Shows what is to be filled in, what just was, and the masks around (dKV-Cache-Greedy): an approximation.

    Needs a selector that says beforehand what will be filled in.

    Args:
        window: masks shown around each, half of them on either side.
        refresh: everything is shown in every so many forwards of a block.
    """

    window: int = 4
    refresh: int = 2

    def __post_init__(self) -> None:
        _check_refresh(self.refresh)
        if self.window < 0:
            raise ValueError(f"window must be at least 0, not {self.window}")

    def check(self, denoiser: Denoiser, pattern: Pattern) -> None:
        _check_predicate(denoiser)

    def shown(self, canvas: Canvas, candidates_BL: Tensor, shifted: bool) -> Tensor:
        masked_BL = canvas.masked_BL
        near_BL = candidates_BL
        if shifted:  # where they are read
            near_BL = near_BL | candidates_BL.roll(-1, 1)
        for distance in range(1, self.window // 2 + 1):
            near_BL = near_BL | masked_BL & (candidates_BL.roll(distance, 1) | candidates_BL.roll(-distance, 1))
        just_BL = ~masked_BL & ~canvas.clean_BL
        all_B = canvas.forwards_B % self.refresh == 0
        return _seen(canvas) & (near_BL | just_BL | all_B[:, None] | _outside(canvas))


@dataclass(frozen=True)
class Causal(Nothing):
    """Shows each token once, after it was filled in, and no masks: exact, the AR model's own way."""

    def check(self, denoiser: Denoiser, pattern: Pattern) -> None:
        if pattern.context_rank != "causal" and pattern != AUTOREGRESSIVE:
            raise ValueError(
                "the autoregressive decoder needs a model whose tokens see only earlier ones: an AR source, or a "
                "conversion with model.context_rank: causal"
            )
        _check_predicate(denoiser)

    def pattern(self, pattern: Pattern) -> Pattern:
        return AUTOREGRESSIVE

    def shown(self, canvas: Canvas, candidates_BL: Tensor, shifted: bool) -> Tensor:
        return super().shown(canvas, candidates_BL, shifted) & ~canvas.masked_BL & ~canvas.clean_BL


def exact(denoiser: Denoiser) -> Reuse:
    """What saves most without changing a logit, for a model."""
    if denoiser.predicate is not sees or denoiser.pattern.block_size is None:
        return Nothing()
    return Causal() if denoiser.pattern == AUTOREGRESSIVE and denoiser.shift == "next_token" else Prefix()


def _seen(canvas: Canvas) -> Tensor:
    """What is looked at and can still change."""
    final_B = torch.zeros_like(canvas.final_B) if canvas.ahead else canvas.final_B
    return canvas.span(final_B, canvas.reach_B)


def _outside(canvas: Canvas) -> Tensor:
    """What lies before the block and is yet to be shown as its context; nothing where later blocks are seen."""
    return canvas.span(canvas.final_B, canvas.start_B) & (not canvas.ahead)


def _check_refresh(refresh: int) -> None:
    if refresh < 1:
        raise ValueError(f"refresh must be at least 1, not {refresh}")


def _check_predicate(denoiser: Denoiser) -> None:
    if denoiser.predicate is not sees:
        raise ValueError("a recipe that says itself who sees whom is decoded without a cache")
