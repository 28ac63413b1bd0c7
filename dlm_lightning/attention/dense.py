"""The reference backend: torch's scaled dot-product attention under a dense boolean mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_lightning.view import View, attention_mask


@dataclass(frozen=True)
class Plan:
    """Who sees whom of a view [B, S] among the keys [B, K] it looks at; S = K without a cached context.

    The mask of each sliding window that layers ask for is made at the first of them, and kept.
    """

    view: View
    keys: View
    predicate: Callable[[View, View], Tensor]
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows that layers have asked for; None is without one."""
        return {*self.masks}

    def mask(self, window: int | None = None) -> Tensor:
        """A bool mask [B, 1, S, K], true where the query (third axis) sees the key."""
        if window not in self.masks:
            self.masks[window] = attention_mask(self.view, self.predicate, self.keys, window).unsqueeze(1)
        return self.masks[window]

    def attend(
        self,
        q_BHSD: Tensor,
        k_BGKD: Tensor,
        v_BGKD: Tensor,
        scaling: float | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention of H query heads over G key and value heads: [B, S, H, D]."""
        mask_B1SK = self.mask(window)
        share = q_BHSD.shape[1] // k_BGKD.shape[1]
        shared = q_BHSD.is_cpu and softcap is None  # on GPUs, no kernel that takes a mask has heads that share keys
        k, v = (x if shared or share == 1 else x.repeat_interleave(share, dim=1) for x in (k_BGKD, v_BGKD))
        if softcap is None:
            gqa = k.shape[1] != q_BHSD.shape[1]
            out_BHSD = F.scaled_dot_product_attention(q_BHSD, k, v, mask_B1SK, scale=scaling, enable_gqa=gqa)
        else:
            out_BHSD = _softcapped(q_BHSD, k, v, mask_B1SK, scaling, softcap)
        return out_BHSD.transpose(1, 2).contiguous()


def _softcapped(
    q_BHSD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask_B1SK: Tensor, scaling: float | None, softcap: float
) -> Tensor:
    """Attention whose scores pass c·tanh(score / c) before the softmax, as Gemma 2's: torch's kernels lack it."""
    scores_BHSK = q_BHSD @ k_BHKD.transpose(2, 3) * (scaling or q_BHSD.shape[-1] ** -0.5)
    scores_BHSK = softcap * torch.tanh(scores_BHSK / softcap)
    weights_BHSK = scores_BHSK.masked_fill(~mask_B1SK, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights_BHSK.to(v_BHKD.dtype) @ v_BHKD


def plan(view: View, predicate: Callable[[View, View], Tensor], keys: View | None = None) -> Plan:
    """The predicate's masks of a view on `keys`, by default itself, materialised."""
    return Plan(view, keys or view, predicate)
