"""Noise: raw uniforms that depend on nothing but the sample, the maskings made of them, and each masking's weight.

Shapes: B rows, L tokens of a row. A group is a block or a document, named by the row index of its first token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

STRATA = 16  # consecutive samples share out (0, 1] among them, slot by slot
_BITS = 20  # a stratum number and this many bits below it fit exactly into a float32
_GRID = STRATA << _BITS  # uniforms are multiples of 1 / 2^24


def raw(seed: int, stream: int, *counter: int, count: int) -> np.ndarray:
    """`count` random uint64 that are a pure function of the other arguments, the same on every machine.

    Philox 4×64 keyed by (seed, stream) at up to three counter words; only its raw output is used, whose sequence
    numpy guarantees.
    """
    words = [0, *(c % 2**64 for c in counter)] + [0] * (3 - len(counter))
    key = np.array([seed % 2**64, stream], np.uint64)  # a mixed list would pass through float64
    return np.random.Philox(key=key, counter=np.array(words, np.uint64)).random_raw(count)


def uniforms(seed: int, stream: int, place: int, epoch: int, view: int, length: int) -> tuple[Tensor, Tensor]:
    """The raw uniforms of one sample: u_L in [0, 1) for its tokens and t_L in (0, 1] for its slots, float32.

    A pure function of (seed, sample, epoch, view), where the sample is named by its place in the epoch's order. Over
    the samples of a run of STRATA places, each slot's t falls once into each stratum; for one sample, slots are
    independent. `stream` keeps training, validation and test apart.
    """
    words_L = raw(seed, stream, place, epoch, 2 * view, count=length)
    u_L = (words_L >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    within_L = (words_L & np.uint64(2**_BITS - 1)) + np.uint64(1)
    turn_L = raw(seed, stream, place // STRATA, epoch, 2 * view + 1, count=length) % np.uint64(STRATA)
    stratum_L = (turn_L + np.uint64(place % STRATA)) % np.uint64(STRATA)
    t_L = ((stratum_L << np.uint64(_BITS)) + within_L).astype(np.float32) / np.float32(STRATA << _BITS)
    return torch.from_numpy(u_L), torch.from_numpy(t_L)


def turned(u_BL: Tensor, t_BL: Tensor, view: int, views: int, mirrored: bool = True) -> tuple[Tensor, Tensor]:
    """The uniforms of one of several noisy views of a sample, made of the sample's own, which are those of view 0.

    Each view's are distributed as the sample's own, so a mean over views keeps its expectation; together they lie far
    apart. Over the views, each t falls once into each of `views` equal parts of (0, 1]. Views come in pairs half a turn
    of t apart; u is turned from pair to pair, and `mirrored` within a pair: the first to be masked is then the last.
    """
    if view == 0:
        return u_BL, t_BL
    pairs = (views + 1) // 2
    pair, second = divmod(view, 2)
    # in whole steps of the grid, because a float32 sum above 1 would be rounded
    u_steps_BL = ((u_BL * _GRID).long() + pair * _GRID // pairs) % _GRID
    if mirrored and second:
        u_steps_BL = _GRID - 1 - u_steps_BL
    t_steps_BL = ((t_BL * _GRID).long() - 1 + (pair + second * pairs) * _GRID // views) % _GRID + 1
    return u_steps_BL.float() / _GRID, t_steps_BL.float() / _GRID


class Masked(NamedTuple):
    """One noisy copy: which tokens are masked (bool [B, L]) and what each weighs in the loss (float32, 0 elsewhere)."""

    mask_BL: Tensor
    weight_BL: Tensor


WEIGHTS = {
    "bernoulli": ("inverse_p",),
    "exact": ("count_ratio",),
    "exact_round": ("inverse_t",),
    "tilted": ("inverse_t", "count_ratio"),
    "complementary": ("one",),
}


@dataclass(frozen=True)
class Noise:
    """Which tokens of a group are masked at noise level t, and what each masked token weighs in the loss.

    Args:
        masking: `bernoulli`: each token with p = (1 − ε)t + ε. `exact`: k = ceil(t·L') of the group's L' maskable
            tokens. `exact_round`: k = round(t·L'). `tilted`: k = round(t·L') by Gumbel-top-k with log-weights
            β(1 − t)i, β = ln 2 / (λL'), which favours late tokens (Efficient-DLM, eq. 2). `complementary`: bernoulli
            for one copy, everything else for the other (Fast-dLLM v2).
        weight: `inverse_p` (1/p), `count_ratio` (L'/k), `inverse_t` (1/t) or `one`; goes with the masking.
        t_per: whether t is drawn for each `block` or for each `document` of a row.
        half_life: λ of the tilted masking: the share of a block over which the masking weight doubles as t → 0.
        eps: ε of the bernoulli masking, a floor under p.
    """

    masking: Literal["bernoulli", "exact", "exact_round", "tilted", "complementary"] = "exact"
    weight: Literal["inverse_p", "count_ratio", "inverse_t", "one"] = "count_ratio"
    t_per: Literal["block", "document"] = "block"
    half_life: float = 0.1
    eps: float = 1e-3

    def __post_init__(self):
        fitting = WEIGHTS[self.masking]
        if self.weight not in fitting:
            raise ValueError(
                f"noise.weight: {self.weight} does not go with noise.masking: {self.masking}, "
                f"which takes {' or '.join(fitting)}"
            )
        if not self.half_life > 0:
            raise ValueError(f"noise.half_life must be above 0, not {self.half_life}")
        if not 0 <= self.eps < 1:
            raise ValueError(f"noise.eps must lie in [0, 1), not {self.eps}")

    def draw(self, u_BL: Tensor, t_BL: Tensor, maskable_BL: Tensor, block_BL: Tensor, document_BL: Tensor) -> Masked:
        """Mask the maskable tokens; `block_BL` and `document_BL` name each token's block and document (see `groups`).

        Exact counts are kept in every block when t is drawn per block, in every document when drawn per document.
        """
        group_BL = block_BL if self.t_per == "block" else document_BL
        t_BL = t_BL.gather(1, group_BL)
        if self.masking in ("bernoulli", "complementary"):
            p_BL = (1 - self.eps) * t_BL + self.eps
            mask_BL = maskable_BL & (u_BL < p_BL)
            weight_BL = torch.ones_like(p_BL) if self.weight == "one" else 1 / p_BL
        else:
            size_BL = torch.zeros_like(group_BL).scatter_add(1, group_BL, maskable_BL.long()).gather(1, group_BL)
            exact_BL = t_BL * size_BL
            k_BL = (exact_BL.ceil() if self.masking == "exact" else exact_BL.round()).long()
            log_weight_BL = self._tilt(t_BL, size_BL, maskable_BL) if self.masking == "tilted" else 0.0
            gumbel_BL = -torch.log(-torch.log(u_BL.double().clamp(min=2**-25)))
            mask_BL = maskable_BL & (rank_in_group(log_weight_BL + gumbel_BL, maskable_BL, group_BL) < k_BL)
            weight_BL = 1 / t_BL if self.weight == "inverse_t" else size_BL / k_BL.clamp(min=1)
        return Masked(mask_BL, torch.where(mask_BL, weight_BL, 0.0).float())

    def _tilt(self, t_BL: Tensor, size_BL: Tensor, maskable_BL: Tensor) -> Tensor:
        index_BL = maskable_BL.long().cumsum(1)  # up to a constant of the group, which does not change the order
        beta_BL = math.log(2) / (self.half_life * size_BL.clamp(min=1))
        return beta_BL * (1 - t_BL) * index_BL


def rank_in_group(score_BL: Tensor, maskable_BL: Tensor, group_BL: Tensor) -> Tensor:
    """Each token's place, from 0, when its group is sorted by descending score with unmaskable tokens last.

    Groups are runs of neighbours, so after sorting by score and then stably by group they hold the same slots.
    """
    score_BL = torch.where(maskable_BL, score_BL, -torch.inf)
    by_score_BL = score_BL.argsort(dim=1, descending=True, stable=True)
    by_group_BL = group_BL.gather(1, by_score_BL).argsort(dim=1, stable=True)
    order_BL = by_score_BL.gather(1, by_group_BL)
    return order_BL.argsort(dim=1) - group_BL


NELBO = Noise(masking="exact", weight="count_ratio")
