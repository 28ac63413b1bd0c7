"""Likelihood: the block-wise bound that models of every pattern and block size are compared by, and the chain rule.

    −log p(x) ≤ Σ_b E_{t, x̃^b} [ L'/k Σ_{masked i} −log p(x^i | x^{<b}, x̃^b) ],   k = ⌈t·L'⌉ of the L' tokens of block b

Blocks here are of any size, whatever the model's own: with a clean prefix and one noisy block, as a decoder shows them.
Blocks of one token give the chain rule from left to right, which is exact.

Shapes: B rows, L tokens of a row, S tokens of a row of the view, N scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dlm_lightning.denoiser import Denoiser
from dlm_lightning.loss import Scored, score
from dlm_lightning.noise import NELBO, Masked, uniforms
from dlm_lightning.view import AUTOREGRESSIVE, Batch, Pattern, View, groups

Future = Literal["masked", "absent"]
FUTURES: tuple[Future, ...] = ("masked", "absent")


@dataclass(frozen=True)
class Blocks:
    """Which bound: blocks of how many tokens, and what is shown behind a block.

    size: tokens per block, on the document's own positions.
    future: `masked` keeps the model's own blocks (or whole documents) and masks what follows in them, as in training;
        `absent` shows nothing behind the block, which has the attention of a block of this size. For sizes from the
        model's own block on they are the same.
    """

    size: int
    future: Future = "masked"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a bound's block size must be at least 1, not {self.size}")
        if self.future not in FUTURES:
            raise ValueError(f"a bound's future is {' or '.join(FUTURES)}, not {self.future}")

    def pattern(self, own: Pattern) -> Pattern:
        """The pattern that a model of this one is read by; a noisy context becomes a clean one.

        A model without blocks keeps its own. ValueError for blocks of more than a token of an autoregressive model.
        """
        if own == AUTOREGRESSIVE and self.size > 1:
            raise ValueError(f"an autoregressive model never saw a mask, so it has no bound by blocks of {self.size}")
        if own.block_size is None:
            return own
        size = self.size
        if self.future == "masked" and size < own.block_size:
            if own.block_size % size:
                raise ValueError(f"a bound's block size {size} does not divide the model's block, {own.block_size}")
            size = own.block_size
        return Pattern(size, "clean", own.context_rank)


def redrawn(batch: Batch, seed: int, stream: int, draw: int) -> tuple[Batch, Tensor]:
    """The batch with other uniforms, and those [B, L] in (0, 1] by which `bound` chooses blocks.

    A pure function of seed, stream, draw and the samples' places.
    """
    length, device = batch.u_BL.shape[1], batch.u_BL.device

    def drawn(view: int) -> list[Tensor]:
        pairs = [uniforms(seed, stream, max(place, 0), 0, view, length) for place in batch.place_B.tolist()]
        return [torch.stack(tensors).to(device) for tensors in zip(*pairs, strict=True)]

    u_BL, t_BL = drawn(2 * draw)
    return batch._replace(u_BL=u_BL, t_BL=t_BL), drawn(2 * draw + 1)[1]


class Bound(NamedTuple):
    """What a pass gives of a bound, all float32 [B, L] and 0 for tokens that it does not score.

    nll_BL: −log p.
    weight_BL: what that counts.
    level_BL: k/L', the share of the token's block that is masked.
    """

    nll_BL: Tensor
    weight_BL: Tensor
    level_BL: Tensor

    @property
    def share_BL(self) -> Tensor:
        """Each token's share in the bound, in nats."""
        return self.nll_BL * self.weight_BL


def bound(denoiser: Denoiser, batch: Batch, blocks: Blocks, turn: int | Tensor) -> Bound:
    """One pass of the bound, by the batch's noise; only maskable tokens are scored.

    Where the model's own blocks (or documents) hold several blocks of this size, each shows one of them as the noisy
    one: the one of number `turn`, so that all `turns` add up to the bound; or one chosen by uniforms [B, L] in (0, 1],
    one per slot, that counts for all, so that the bound is estimated without bias.
    """
    shown = lay_out(denoiser, batch, blocks, turn)
    first_token, denoiser.first_token = denoiser.first_token, "clean"  # as decoders read it, however it was trained
    try:
        nll_N = denoiser(shown.view, shown.scored.index_N, shown.scored.target_N)
    finally:
        denoiser.first_token = first_token

    def over_tokens(value_N: Tensor) -> Tensor:
        value_BS = torch.zeros(shown.view.ids_BS.shape, device=value_N.device)
        value_BS.view(-1)[shown.scored.index_N] = value_N.float()
        return value_BS[:, : batch.ids_BL.shape[1]]

    return Bound(over_tokens(nll_N), over_tokens(shown.scored.weight_N), shown.level_BL)


def turns(denoiser: Denoiser, batch: Batch, blocks: Blocks) -> int:
    """How many turns add up to the bound: the most blocks with something to score that a block of the model's holds."""
    if denoiser.pattern == AUTOREGRESSIVE:
        return 1
    _, count_BL = _chosen(batch, blocks.pattern(denoiser.pattern), blocks.size, 0)
    return max(1, int(count_BL.max()))


class Shown(NamedTuple):
    """What a pass shows, the noisy copy first; what it scores; and k/L' of the masked tokens that it scores [B, L]."""

    view: View
    scored: Scored
    level_BL: Tensor


def lay_out(denoiser: Denoiser, batch: Batch, blocks: Blocks, turn: int | Tensor) -> Shown:
    """What `bound` shows and scores."""
    pattern = blocks.pattern(denoiser.pattern)
    if denoiser.pattern == AUTOREGRESSIVE:
        view = AUTOREGRESSIVE.lay_out(batch, [], denoiser.mask_id)
        return Shown(view, score(batch, view, [], ar_weight=1.0), batch.maskable_BL.float())
    chosen_BL, count_BL = _chosen(batch, pattern, blocks.size, turn)
    block_BL = groups(batch.position_BL, batch.document_BL, blocks.size)
    whole_BL = groups(batch.position_BL, batch.document_BL, pattern.block_size)
    mask_BL, weight_BL = NELBO.draw(batch.u_BL, batch.t_BL, chosen_BL, block_BL, block_BL)
    nowhere_BL = torch.full_like(whole_BL, whole_BL.shape[1])
    chosen_block_BL = nowhere_BL.scatter_reduce(1, whole_BL, torch.where(chosen_BL, block_BL, nowhere_BL), "amin")
    future_BL = block_BL > chosen_block_BL.gather(1, whole_BL)
    view = pattern.lay_out(batch, [mask_BL | future_BL], denoiser.mask_id)
    if blocks.future == "absent" and pattern.block_size is None:
        padding_BL = -1 - torch.arange(future_BL.shape[1], device=future_BL.device) - future_BL.shape[1]
        view = replace(view, document_BS=torch.where(future_BL, padding_BL, batch.document_BL), structure=None)
    level_BL = torch.where(mask_BL, 1 / weight_BL, 0.0)  # the weight is L'/k
    if isinstance(turn, Tensor):
        weight_BL = weight_BL * count_BL
    return Shown(view, score(batch, view, [Masked(mask_BL, weight_BL)]), level_BL)


def _chosen(batch: Batch, pattern: Pattern, size: int, turn: int | Tensor) -> tuple[Tensor, Tensor]:
    """Which maskable tokens lie in the chosen block of their group, and how many blocks of the group have such tokens.

    Groups are the pattern's blocks, or documents. bool and int64 [B, L].
    """
    block_BL = groups(batch.position_BL, batch.document_BL, size)
    whole_BL = groups(batch.position_BL, batch.document_BL, pattern.block_size)
    maskable_BL = torch.zeros_like(block_BL).scatter_add(1, block_BL, batch.maskable_BL.long())
    open_BL = (maskable_BL > 0).long()  # at the first token of each block that has something to score
    count_BL = torch.zeros_like(block_BL).scatter_add(1, whole_BL, open_BL).gather(1, whole_BL)
    before_BL = open_BL.cumsum(1) - open_BL
    number_BL = before_BL.gather(1, block_BL) - before_BL.gather(1, whole_BL)
    if isinstance(turn, Tensor):
        turn_BL = (turn.gather(1, whole_BL) * count_BL).ceil().long() - 1
    else:
        turn_BL = torch.full_like(count_BL, turn)
    return batch.maskable_BL & (number_BL == turn_BL), count_BL
