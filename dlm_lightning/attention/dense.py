"""The reference backend: torch's scaled dot-product attention under a dense boolean mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dlm_lightning.view import View, attention_mask


@dataclass(frozen=True)
class Plan:
    """A bool mask [B, 1, S, K], true where the query (third axis) sees the key; S = K without a cached context."""

    mask_B1SK: Tensor

    def attend(self, q_BHSD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float | None) -> Tensor:
        """Attention of H query heads over G key and value heads: [B, S, H, D]."""
        gqa = q_BHSD.shape[1] != k_BGKD.shape[1]
        out_BHSD = F.scaled_dot_product_attention(
            q_BHSD, k_BGKD, v_BGKD, attn_mask=self.mask_B1SK, scale=scaling, enable_gqa=gqa
        )
        return out_BHSD.transpose(1, 2).contiguous()


def plan(view: View, predicate: Callable[[View, View], Tensor], keys: View | None = None) -> Plan:
    """The predicate's mask of a view on `keys`, by default itself, materialised."""
    return Plan(attention_mask(view, predicate, keys).unsqueeze(1))
