"""What a training step is measured by, as one vector that micro-batches and ranks add up.

Shapes: B rows, L tokens per copy, S tokens of a row of the view, N scored tokens, C levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dlm_lightning import shards
from dlm_lightning.loss import Scored, weighted_sum
from dlm_lightning.noise import Masked
from dlm_lightning.transfer import send
from dlm_lightning.view import Batch, View, groups

LEVELS = 4  # equal parts of (0, 1] by which the cross-entropy of masked tokens is told apart
NAMES = tuple(f"{level / LEVELS:.2f}-{(level + 1) / LEVELS:.2f}" for level in range(LEVELS))


class Tally(NamedTuple):
    """Sums over the micro-batches and ranks of one optimizer step, as scalars on the device.

    loss: the weighted sum of −log p.
    maskable: tokens that it is divided by.
    data: tokens of the corpus, padding left out.
    scored: terms of the loss.
    forward: tokens that the network computed, those of all copies and of padding.
    masked_ce: the mean unweighted −log p of masked tokens by the share of their group that is masked (`NAMES`), nan
    where there are none; empty for a recipe that masks nothing.
    """

    loss: Tensor
    maskable: Tensor
    data: Tensor
    scored: Tensor
    forward: Tensor
    masked_ce: dict[str, Tensor]

    @staticmethod
    def read(vector: Tensor) -> Tally:
        """From the sum of the vectors of `count`."""
        loss, maskable, data, scored, forward, *levels = vector.unbind()
        sums, counts = levels[: len(levels) // 2], levels[len(levels) // 2 :]
        means = (total / n for total, n in zip(sums, counts, strict=True))
        return Tally(loss, maskable, data, scored, forward, dict(zip(NAMES, means, strict=False)))


def count(
    batch: Batch, view: View, copies: Sequence[Masked], scored: Scored, nll_N: Tensor, block_size: int | None
) -> Tensor:
    """A micro-batch's part of the tally, float32, where `nll_N` is; all else may be on the host.

    The groups of the noise are blocks of this size, or documents.
    """
    nll_N, device = nll_N.detach(), nll_N.device
    loss = weighted_sum(nll_N, send(scored.weight_N, device))
    sizes = torch.tensor([len(nll_N), view.ids_BS.numel()], device=batch.ids_BL.device)
    counts = torch.stack([batch.maskable_BL.sum(), (batch.document_BL >= 0).sum(), *sizes]).float()
    numbers = torch.cat([loss[None], send(counts, device)])
    if not copies:
        return numbers
    group_BL = groups(batch.position_BL, batch.document_BL, block_size)
    level_BS = torch.full_like(view.ids_BS, LEVELS)
    masked = [level(mask_BL, batch.maskable_BL, group_BL) for mask_BL, _ in copies]
    level_BS[:, : len(copies) * batch.ids_BL.shape[1]] = torch.cat(masked, dim=1)
    level_N = send(level_BS.flatten()[scored.index_N], device)
    in_CN = level_N == torch.arange(LEVELS, device=device)[:, None]
    return torch.cat([numbers, torch.where(in_CN, nll_N, 0).sum(1), in_CN.sum(1)])


def level(mask_BL: Tensor, maskable_BL: Tensor, group_BL: Tensor) -> Tensor:
    """For each token the part of (0, 1], from 0, that the masked share of its group's maskable tokens lies in.

    Parts are closed above; LEVELS for a token that is not masked. int64 [B, L].
    """

    def per_group(which_BL: Tensor) -> Tensor:
        return torch.zeros_like(group_BL).scatter_add(1, group_BL, which_BL.long()).gather(1, group_BL)

    part_BL = (LEVELS * per_group(mask_BL) - 1) // per_group(maskable_BL).clamp(min=1)
    return torch.where(mask_BL, part_BL, LEVELS)


def over_ranks(vector: Tensor) -> Tensor:
    """The sum over all ranks, in the vector's place; Lightning's own reduction would wait for a GPU."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(vector)
    return vector


def norms(gradients: list[Tensor]) -> Tensor:
    """The norm of each of P gradients [P], whole also where they are shards; all ranks call it together then."""
    return shards.whole(torch.stack(torch._foreach_norm(gradients)))
