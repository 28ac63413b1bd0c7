"""The loss: which tokens of a view are scored, with what weight, and the weighted sum of their cross-entropies.

Shapes: B rows, L tokens per copy, S tokens per row of the view, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dlm_lightning.noise import Masked
from dlm_lightning.transfer import send
from dlm_lightning.view import Batch, View


class Scored(NamedTuple):
    """The terms of a loss: flat index into [B·S] of each scored token, its true id and its weight, all [N]."""

    index_N: Tensor
    target_N: Tensor
    weight_N: Tensor

    def to(self, device: torch.device) -> Scored:
        """The same terms on a device."""
        return Scored(*(send(tensor, device) for tensor in self))


def score(batch: Batch, view: View, copies: Sequence[Masked], ar_weight: float = 0.0) -> Scored:
    """Score the masked tokens of each noisy copy, and each maskable token of the clean copy with `ar_weight`.

    Noisy copies lie first in the view, in the order of `copies`; the clean copy, if one is scored, is last.
    """
    weights = [weight_BL for _, weight_BL in copies]
    plain = view.ids_BS.shape[1] // batch.ids_BL.shape[1] - len(copies)
    weights += [ar_weight * batch.maskable_BL.float()] * plain
    weight_BS = torch.cat(weights, dim=1)
    index_N = weight_BS.flatten().nonzero().squeeze(1)
    target_BS = batch.ids_BL.repeat(1, len(copies) + plain)
    return Scored(index_N, target_BS.flatten()[index_N], weight_BS.flatten()[index_N])


def weighted_sum(nll_N: Tensor, weight_N: Tensor) -> Tensor:
    """Σ w·(−log p): a sum, never a mean, because the denominator is the token count over ranks and micro-batches."""
    return (nll_N.float() * weight_N).sum()
