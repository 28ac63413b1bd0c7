"""FlashAttention by flash-attn or torch's own: packed documents in full or causally, and blocks on a cache.

Views say so themselves (`View.structure`), because looking at the coordinates would wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from dlm_lightning.attention import dense
from dlm_lightning.view import View, document_starts, sees

HALF = torch.bfloat16  # what float32 becomes under autocast


@cache
def kernel() -> Callable | None:
    """flash-attn's packed kernel, or torch's own, which has no softcap; None where neither is installed."""
    try:
        from flash_attn import flash_attn_varlen_func  # an extra; importing it needs CUDA
    except ImportError:
        return own_kernel()
    return flash_attn_varlen_func


def own_kernel() -> Callable | None:
    """Torch's packed kernel, called as flash-attn's is; None where this torch has none that shares keys among heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "enable_gqa" not in signature(varlen_attn).parameters:
        return None

    def attend(*runs: Any, softmax_scale: float | None, causal: bool, window_size: tuple[int, int]) -> Any:
        left, right = window_size
        options: Any = {"window_size": (left, 0) if causal else (left, right), "enable_gqa": True}
        return varlen_attn(*runs, scale=softmax_scale, **options)

    return attend


@cache
def cached_kernel() -> Callable | None:
    """flash-attn's kernel for queries on a cache, or None where the package is missing."""
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    return flash_attn_with_kvcache


@dataclass(frozen=True)
class Plan:
    """Documents as runs of the flattened rows: cumulative starts (int32, one more than runs), longest run, order."""

    starts: Tensor
    longest: int
    causal: bool
    masked: dense.Plan  # for what the kernel has not

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows that had to be materialised."""
        return self.masked.windows

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
        attend: Any = kernel()
        if softcap is not None and "softcap" not in signature(attend).parameters:
            return self.masked.attend(q_BHSD, k_BGSD, v_BGSD, scaling, window, softcap)
        B, _, S, _ = q_BHSD.shape
        half = HALF if q_BHSD.dtype == torch.float32 else q_BHSD.dtype
        flat = [x.transpose(1, 2).flatten(0, 1).to(half) for x in (q_BHSD, k_BGSD, v_BGSD)]
        runs = (self.starts, self.starts, self.longest, self.longest)
        reach = -1 if window is None else window - 1  # -1 is without end
        options: dict[str, Any] = {"softmax_scale": scaling, "window_size": (reach, reach)}
        if softcap is not None:
            options["softcap"] = softcap
        out = attend(*flat, *runs, causal=self.causal, **options)
        return out.view(B, S, *out.shape[1:]).to(q_BHSD.dtype)


def plan(view: View, predicate: Callable[[View, View], Tensor], dtype: torch.dtype = torch.float32) -> Plan | None:
    """The runs of a view that is full or causal per document under `sees`; None where this kernel does not apply.

    `dtype` is the network's; float32 without autocast is not given away for speed.
    """
    if view.structure not in ("full", "causal") or not _applies(view, predicate, dtype) or kernel() is None:
        return None
    starts = document_starts(view.document_BS) if view.starts is None else view.starts
    longest = view.document_BS.shape[1]  # a bound, so that nothing waits for the device
    return Plan(starts, longest, view.structure == "causal", dense.plan(view, predicate))


@dataclass(frozen=True)
class CachedPlan:
    """Groups of queries as sequences of their own: the row of the cache that each looks at, and how far (int32).

    Layers with a sliding window go by the mask: the kernel would count a window from where a group ends.
    """

    row_N: Tensor
    reach_N: Tensor
    size: int
    masked: dense.Plan

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows that had to be materialised."""
        return self.masked.windows

    def attend(
        self,
        q_BHSD: Tensor,
        k_BGKD: Tensor,
        v_BGKD: Tensor,
        scaling: float | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention of H query heads over G key and value heads of the cache: [B, S, H, D]."""
        if window is not None:
            return self.masked.attend(q_BHSD, k_BGKD, v_BGKD, scaling, window, softcap)
        B, H, S, D = q_BHSD.shape
        half = HALF if q_BHSD.dtype == torch.float32 else q_BHSD.dtype
        q_NSHD = q_BHSD.transpose(1, 2).reshape(-1, self.size, H, D).to(half)
        k_BKGD, v_BKGD = (x.transpose(1, 2).to(half) for x in (k_BGKD, v_BGKD))
        attend: Any = cached_kernel()
        places = {"cache_seqlens": self.reach_N, "cache_batch_idx": self.row_N}
        options = {"softmax_scale": scaling, "causal": False, "softcap": softcap or 0.0}
        return attend(q_NSHD, k_BKGD, v_BKGD, **places, **options).reshape(B, S, H, D).to(q_BHSD.dtype)


def cached_plan(
    view: View, predicate: Callable[[View, View], Tensor], keys: View, dtype: torch.dtype = torch.float32
) -> CachedPlan | None:
    """The groups of a view [B, S] that says it has some, on a cache's slots; None where this kernel does not apply."""
    size = view.structure
    if not isinstance(size, int) or not _applies(view, predicate, dtype) or cached_kernel() is None:
        return None
    position_BNS = view.position_BS.unflatten(1, (-1, size))
    B, N = position_BNS.shape[:2]
    row_N = torch.arange(B, dtype=torch.int32, device=position_BNS.device).repeat_interleave(N)
    return CachedPlan(row_N, (position_BNS.amax(2) + 1).flatten().int(), size, dense.plan(view, predicate, keys))


def _applies(view: View, predicate: Callable[[View, View], Tensor], dtype: torch.dtype) -> bool:
    """On CUDA, under the family's predicate, in half precision: float32 is not given away for speed."""
    half = torch.is_autocast_enabled("cuda") or dtype != torch.float32
    return predicate is sees and view.ids_BS.is_cuda and half
