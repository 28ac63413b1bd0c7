"""Attention backends: each turns a view into a plan once per forward, and attends by it in every layer.

The transformers network is built with `attn_implementation=NAME`; the plan reaches `attend` as a keyword argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from transformers import AttentionInterface

from dlm_lightning.attention import dense, flash, flex, split
from dlm_lightning.view import View

NAME = "dlm_lightning"
SMALL = 512  # tokens of a row below which a GPU's dense mask costs less than a kernel that is compiled for it
Backend = Literal["auto", "dense", "split", "flex", "fa4", "flash"]
Plan = dense.Plan | split.Plan | flex.Plan | flash.Plan | flash.CachedPlan


def plan(
    view: View,
    predicate: Callable[[View, View], Tensor],
    keys: View | None = None,
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> Plan:
    """The plan of a backend, which computes exactly what the predicate says for this view.

    `keys`, by default the view itself, are the tokens it looks at: with a cache, the context and then the view. `dtype`
    is that of the network's parameters. A backend that is asked for computes what it can, the fastest one the rest.
    """
    if keys is not None and keys is not view:
        return flash.cached_plan(view, predicate, keys, dtype) or dense.plan(view, predicate, keys)
    return _plan(backend, view, predicate, dtype) or _fastest(view, predicate, dtype)


def require(
    backend: Backend, view: View, predicate: Callable[[View, View], Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Raises ValueError for a backend that does not compute such views."""
    if backend != "auto" and _plan(backend, view, predicate, dtype) is None:
        raise ValueError(f"model.attention: {backend} does not compute this recipe's views; it {NEEDS[backend]}")


NEEDS = {
    "split": "needs a CPU",
    "flex": "needs CUDA, Triton and a recipe that keeps the family's predicate",
    "fa4": "needs flash-attn-4, torch 2.13, a GPU of the Hopper or Blackwell kind, bfloat16, and what flex needs",
    "flash": "needs CUDA, bfloat16, and documents that are each attended in full or causally",
}


def _plan(backend: Backend, view: View, predicate: Callable[[View, View], Tensor], dtype: torch.dtype) -> Plan | None:
    if backend == "dense":
        return dense.plan(view, predicate)
    if backend == "split":
        return split.plan(view, predicate)
    if backend == "flex":
        return flex.plan(view, predicate)
    if backend == "fa4":
        return flex.fa4_plan(view, predicate, dtype)
    if backend == "flash":
        return flash.plan(view, predicate, dtype)
    return None


def _fastest(view: View, predicate: Callable[[View, View], Tensor], dtype: torch.dtype) -> Plan:
    found: Plan | None = split.plan(view, predicate) or flash.plan(view, predicate, dtype)
    if found is None and view.ids_BS.shape[1] >= SMALL:
        found = flex.plan(view, predicate)
    return found or dense.plan(view, predicate)


def attend(
    module, q_BHSD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, attention_mask=None, *, attention_plan: Plan, **options
) -> tuple[Tensor, None]:
    """The attention function of the transformers interface; returns [B, S, H, D] and no weights.

    H query heads, G key and value heads, K keys. Layers may have a sliding window and a soft cap on their scores.
    Refuses what no backend computes: attention sinks.
    """
    if options.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} asks for attention sinks, which this attention does not compute")
    wanted = (options.get(name) for name in ("scaling", "sliding_window", "softcap"))
    return attention_plan.attend(q_BHSD, k_BGKD, v_BGKD, *wanted), None


AttentionInterface.register(NAME, attend)
