"""FlashAttention for packed documents attended in full or causally, where flash-attn is installed.

Views say so themselves (`View.structure`), because looking at the coordinates would wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dlm_lightning.view import View, sees


@cache
def kernel() -> Callable | None:
    """flash-attn's packed kernel, or None where the package is missing."""
    try:
        from flash_attn import flash_attn_varlen_func  # an extra; importing it needs CUDA
    except ImportError:
        return None
    return flash_attn_varlen_func


@dataclass(frozen=True)
class Plan:
    """Documents as runs of the flattened rows: cumulative starts (int32, one more than runs), longest run, order."""

    starts: Tensor
    longest: int
    causal: bool

    def attend(
        self,
        q_BHSD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        scaling: float | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention of H query heads over G key and value heads, document by document: [B, S, H, D]."""
        B, _, S, _ = q_BHSD.shape
        half = torch.bfloat16 if q_BHSD.dtype == torch.float32 else q_BHSD.dtype
        flat = [x.transpose(1, 2).flatten(0, 1).to(half) for x in (q_BHSD, k_BGSD, v_BGSD)]
        runs = (self.starts, self.starts, self.longest, self.longest)
        attend: Any = kernel()
        reach = -1 if window is None else window - 1  # -1 is without end
        options = {"softmax_scale": scaling, "window_size": (reach, reach), "softcap": softcap or 0.0}
        out = attend(*flat, *runs, causal=self.causal, **options)
        return out.view(B, S, *out.shape[1:]).to(q_BHSD.dtype)


def plan(view: View, predicate: Callable[[View, View], Tensor], dtype: torch.dtype = torch.float32) -> Plan | None:
    """The runs of a view that is full or causal per document under `sees`; None where this kernel does not apply.

    `dtype` is the network's; float32 without autocast is not given away for speed.
    """
    half = torch.is_autocast_enabled("cuda") or dtype != torch.float32
    if view.structure is None or predicate is not sees or not view.ids_BS.is_cuda or not half or kernel() is None:
        return None
    document_BS = view.document_BS
    changes_BS = torch.ones_like(document_BS, dtype=torch.bool)
    changes_BS[:, 1:] = document_BS.diff() != 0
    starts = changes_BS.flatten().nonzero().squeeze(1)
    starts = torch.cat([starts, starts.new_tensor([document_BS.numel()])]).int()
    return Plan(starts, int(starts.diff().max()), view.structure == "causal")
