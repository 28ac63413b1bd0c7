"""Selectors: which masks may be filled in next, and which of them are, given how sure the network is.

Shapes: B rows, L tokens of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm_lightning import noise
from dlm_lightning.decode.canvas import Canvas

STREAM = 11  # of random numbers, apart from those of training


class Selector(ABC):
    """Fills in at least one mask of each row that has any."""

    def candidates(self, canvas: Canvas) -> Tensor:
        """The masks that may be filled in by the next forward, bool [B, L]."""
        return canvas.open_BL

    @abstractmethod
    def choose(self, score_BL: Tensor, canvas: Canvas) -> Tensor:
        """Those of the candidates that are, bool [B, L]; the score of all others is -inf."""


@dataclass(frozen=True)
class Threshold(Selector):
    """Every mask whose score is above a threshold, and at least the surest one.

    Args:
        threshold: in (0, 1]; with 1, one token per forward.
        at_most: tokens per forward, the surest ones; null for any number.
    """

    threshold: float = 0.9
    at_most: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], not {self.threshold}")
        if self.at_most is not None and self.at_most < 1:
            raise ValueError(f"at_most must be at least 1 or null, not {self.at_most}")

    def choose(self, score_BL: Tensor, canvas: Canvas) -> Tensor:
        count_B = (score_BL > self.threshold).sum(1).clamp(min=1, max=self.at_most)
        return surest(score_BL, count_B)


@dataclass(frozen=True)
class Schedule(Selector):
    """The surest masks in equal shares, so that each block, or part of one, takes a number of forwards.

    Args:
        forwards: per block or part; one of fewer masks takes one per mask.
    """

    forwards: int = 16

    def __post_init__(self) -> None:
        if self.forwards < 1:
            raise ValueError(f"forwards must be at least 1, not {self.forwards}")

    def choose(self, score_BL: Tensor, canvas: Canvas) -> Tensor:
        left_B = (self.forwards + 1 - canvas.forwards_B).clamp(min=1)  # with the one that was just made
        return surest(score_BL, (canvas.open_BL.sum(1) + left_B - 1) // left_B)


@dataclass(frozen=True)
class LeftToRight(Selector):
    """The first masks, in order.

    Args:
        tokens: per forward.
    """

    tokens: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {self.tokens}")

    def candidates(self, canvas: Canvas) -> Tensor:
        open_BL = canvas.open_BL
        return open_BL & (open_BL.cumsum(1) <= self.tokens)

    def choose(self, score_BL: Tensor, canvas: Canvas) -> Tensor:
        return score_BL > -torch.inf


@dataclass(frozen=True)
class RandomOrder(Selector):
    """The next masks of an order that is drawn beforehand, the same for all rows.

    Args:
        tokens: per forward.
        seed: of the order.
    """

    tokens: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {self.tokens}")

    def candidates(self, canvas: Canvas) -> Tensor:
        rank_L = torch.from_numpy(noise.raw(self.seed, STREAM, count=canvas.ids_BL.shape[1]) / 2.0**64)
        rank_BL = torch.where(canvas.open_BL, rank_L.to(canvas.ids_BL.device), -torch.inf)
        return surest(rank_BL, torch.full_like(canvas.end_B, self.tokens))

    def choose(self, score_BL: Tensor, canvas: Canvas) -> Tensor:
        return score_BL > -torch.inf


def surest(score_BL: Tensor, count_B: Tensor) -> Tensor:
    """As many of each row's highest scores as it asks for, the first of equal ones; never one of -inf."""
    order_BL = score_BL.argsort(dim=1, descending=True, stable=True)
    own_BL = torch.arange(order_BL.shape[1], device=order_BL.device).expand_as(order_BL)
    rank_BL = torch.empty_like(order_BL).scatter_(1, order_BL, own_BL)
    return (rank_BL < count_B[:, None]) & (score_BL != -torch.inf)
