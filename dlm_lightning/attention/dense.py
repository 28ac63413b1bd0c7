"""The reference backend: torch's scaled dot-product attention under a dense boolean mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dlm_lightning.view import View, attention_mask


@dataclass(frozen=True)
class Plan:
    """A bool mask [B, 1, S, S], true where the query (third axis) sees the key."""

    mask_B1SS: Tensor

    def attend(self, q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, scaling: float | None) -> Tensor:
        """Attention of H query heads over G key and value heads: [B, S, H, D]."""
        gqa = q_BHSD.shape[1] != k_BGSD.shape[1]
        out_BHSD = F.scaled_dot_product_attention(
            q_BHSD, k_BGSD, v_BGSD, attn_mask=self.mask_B1SS, scale=scaling, enable_gqa=gqa
        )
        return out_BHSD.transpose(1, 2).contiguous()


def plan(view: View, predicate: Callable[[View, View], Tensor]) -> Plan:
    """The predicate's mask, materialised."""
    return Plan(attention_mask(view, predicate).unsqueeze(1))
