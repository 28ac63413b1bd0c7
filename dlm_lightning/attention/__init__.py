"""Attention backends: each turns a view into a plan once per forward, and attends by it in every layer.

The transformers network is built with `attn_implementation=NAME`; the plan reaches `attend` as a keyword argument.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AttentionInterface

from dlm_lightning.attention import dense, flash
from dlm_lightning.view import View

NAME = "dlm_lightning"
Plan = dense.Plan | flash.Plan | flash.CachedPlan


def plan(
    view: View,
    predicate: Callable[[View, View], Tensor],
    keys: View | None = None,
    dtype: torch.dtype = torch.float32,
) -> Plan:
    """The plan of the fastest installed backend that computes exactly what the predicate says for this view.

    `keys`, by default the view itself, are the tokens it looks at: with a cache, the context and then the view.
    `dtype` is that of the network's parameters.
    """
    if keys is None or keys is view:
        return flash.plan(view, predicate, dtype) or dense.plan(view, predicate)
    return flash.cached_plan(view, predicate, keys, dtype) or dense.plan(view, predicate, keys)


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
