"""Attention on CPUs, part by part: torch's CPU kernel on the queries and keys of each part of a view (see `parts`).

Shapes: B rows, S tokens of a row, G key and value heads, each with h of the H query heads, of D numbers. A part has b
rows and n pieces of Q queries and K keys, the last P of them looked at pair by pair.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dlm_lightning.attention import dense
from dlm_lightning.attention.parts import Part, length, parts
from dlm_lightning.view import View

REACH = 256  # keys at a time in the backward kernel, whose buffers then stay in a core's cache
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Plan:
    """The parts of a view [B, S] that looks at itself, for each sliding window that layers ask for."""

    view: View
    predicate: Callable[[View, View], Tensor]
    masked: dense.Plan  # for what the kernel has not
    laid_out: dict[int | None, list[Part]] = field(default_factory=dict)
    masks: dict[tuple[int | None, int, torch.dtype], _Masks] = field(default_factory=dict)

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows that layers have asked for; None is without one."""
        return self.masked.windows | self.laid_out.keys()

    def lay_out(self, window: int | None = None) -> list[Part]:
        """The parts of layers with this window."""
        if window not in self.laid_out:
            self.laid_out[window] = parts(self.view, self.predicate, window)
        return self.laid_out[window]

    @torch.compiler.disable  # in a layer that is compiled: it is a loop over many shapes
    def attend(
        self,
        q_BHSD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        scaling: float | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention of H query heads over G key and value heads: [B, S, H, D]."""
        if softcap is not None:
            return self.masked.attend(q_BHSD, k_BGSD, v_BGSD, scaling, window, softcap)
        parts, share = self.lay_out(window), q_BHSD.shape[1] // k_BGSD.shape[1]
        key = window, share, _wide(v_BGSD)
        if key not in self.masks:
            self.masks[key] = _Masks(parts, q_BHSD, share, _wide(v_BGSD))
        return _Parted.apply(q_BHSD, k_BGSD, v_BGSD, scaling, parts, self.masks[key])  # type: ignore[return-value]


def plan(view: View, predicate: Callable[[View, View], Tensor]) -> Plan | None:
    """The parts of a view that looks at itself; None for one that is not on a CPU."""
    return Plan(view, predicate, dense.plan(view, predicate)) if view.ids_BS.is_cpu else None


class _Parted(torch.autograd.Function):
    """Attention [B, S, H, D], of which nothing but inputs, output and log-sum-exp is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BHSD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        scaling: float | None,
        parts: list[Part],
        masks: _Masks,
    ):
        wide = _wide(v_BGSD)
        out_BSHD = q_BHSD.new_empty(q_BHSD.transpose(1, 2).shape, dtype=wide)
        q, k, v, out = _grouped(wide, q_BHSD, k_BGSD, v_BGSD, out_BSHD.transpose(1, 2))
        lse = q.new_empty((*q.shape[:-1], 1))
        for part in parts:
            q_part, k_part, v_part = _cut(part, part.queries, q), _cut(part, part.keys, k), _cut(part, part.keys, v)
            found, sums = _attend(q_part, k_part, v_part, 0.0, False, attn_mask=masks(part), scale=scaling)
            _merge(part, out, lse, *(_joined(part, x, q.shape[2]) for x in (found, sums[..., None])))
        out_BSHD = out_BSHD.to(v_BGSD.dtype)  # under autocast, rotary positions leave queries and keys in float32
        ctx.save_for_backward(q_BHSD, k_BGSD, v_BGSD, out_BSHD, lse)
        ctx.scaling, ctx.parts, ctx.masks = scaling, parts, masks
        return out_BSHD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *qkv, out_BSHD, lse = ctx.saved_tensors
        dtypes = [x.dtype for x in qkv]
        *qkv, out, grad = _grouped(lse.dtype, *qkv, out_BSHD.transpose(1, 2), grad_outputs[0].transpose(1, 2))
        grads = [torch.empty_like(qkv[0]), *map(torch.zeros_like, qkv[1:])]
        for part in ctx.parts:
            spans = (part.queries, part.keys, part.keys)
            q_part, k_part, v_part = (_cut(part, where, x) for where, x in zip(spans, qkv, strict=True))
            grad_part, out_part, lse_part = (_cut(part, part.queries, x) for x in (grad, out, lse))
            found = _gradients(grad_part, q_part, k_part, v_part, out_part, lse_part, ctx.masks(part), ctx.scaling)
            of_q, of_k, of_v = (_joined(part, x, total.shape[2]) for x, total in zip(found, grads, strict=True))
            _put(part, part.queries, of_q, grads[0], add=part.pieces > 1)
            _put(part, part.keys, of_k, grads[1], add=True)
            _put(part, part.keys, of_v, grads[2], add=True)
        return *(x.flatten(1, 2).to(dtype) for x, dtype in zip(grads, dtypes, strict=True)), None, None, None


def _put(part: Part, spans: list[slice], x: Tensor, total: Tensor, add: bool) -> None:
    """Put what a part has found where it belongs, or add it to what is there."""
    for span, own in _beside(spans):
        at = (part.rows, slice(None), slice(None), span)
        if not add:
            total[at] = x[:, :, :, own]
        elif isinstance(part.rows, slice):
            total[at].add_(x[:, :, :, own])  # `+=` would copy the sum once more
        else:
            total[at] += x[:, :, :, own]


def _wide(v_BGSD: Tensor) -> torch.dtype:
    """What attention is computed in: float32 at least, for in bfloat16 the kernel's backward pass takes longer."""
    return torch.promote_types(v_BGSD.dtype, torch.float32)


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scaling: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a part's queries, keys and values, REACH keys at a time: each key's depend on no other key."""
    found = []
    for first in range(0, k.shape[2], REACH):
        some = slice(first, first + REACH)
        own = None if mask is None else mask[..., some]
        given = grad, q, k[:, :, some], v[:, :, some], out, lse[..., 0]
        found.append(_attend_backward(*given, 0.0, False, attn_mask=own, scale=scaling))
    if len(found) == 1:
        return found[0]
    grad_q, grad_k, grad_v = zip(*found, strict=True)
    return functools.reduce(Tensor.add_, grad_q), torch.cat(grad_k, 2), torch.cat(grad_v, 2)


def _merge(part: Part, out: Tensor, lse: Tensor, its_out: Tensor, its_lse: Tensor) -> None:
    """Put a part's attention and log-sum-exp where they belong; what is on the diagonal is added to what is there."""
    for span, own in _beside(part.queries):
        at = (part.rows, slice(None), slice(None), span)
        found, sums = its_out[:, :, :, own], its_lse[:, :, :, own]
        if part.pieces > 1:
            found = out[at].lerp(found, (sums - lse[at]).sigmoid())
            sums = torch.logaddexp(lse[at], sums)
        out[at], lse[at] = found, sums


def _grouped(dtype: torch.dtype, q_BHSD: Tensor, k_BGSD: Tensor, *others: Tensor) -> list[Tensor]:
    """All as [B, G, h, S, D]; of keys and values h is 1."""
    return [x.to(dtype).unflatten(1, (k_BGSD.shape[1], -1)) for x in (q_BHSD, k_BGSD, *others)]


def _cut(part: Part, spans: list[slice], x_BGhSD: Tensor) -> Tensor:
    """Spans of a part, its pieces as rows and the heads of a group one behind the other: [b·n, G, Q·h, D]."""
    shape, dim = ((1, -1), 3) if part.pieces == 1 else ((-1, length(spans) // part.pieces), 1)
    found = [x_BGhSD[part.rows, :, :, span].unflatten(3, shape).permute(0, 3, 1, 4, 2, 5) for span in spans]
    x_bnGQhD = torch.cat(found, dim) if len(found) > 1 else found[0]
    return x_bnGQhD.flatten(3, 4).flatten(0, 1)


def _joined(part: Part, x: Tensor, share: int) -> Tensor:
    """What `_cut` has cut, with h heads of a group: [b, G, h, n·Q, D]."""
    x_bnGQhD = x.unflatten(0, (-1, part.pieces)).unflatten(3, (-1, share))
    return x_bnGQhD.permute(0, 2, 4, 1, 3, 5).flatten(3, 4)


def _beside(spans: list[slice]) -> list[tuple[slice, slice]]:
    """Spans, each with where it lies when they follow one another."""
    lengths = [span.stop - span.start for span in spans]
    ends = itertools.accumulate(lengths)
    return [(span, slice(end - size, end)) for span, size, end in zip(spans, lengths, ends, strict=True)]


class _Masks:
    """The kernel's masks [b·n or 1, 1, Q·h, K]; those of parts in one piece are written into the same memory."""

    def __init__(self, parts: list[Part], q_BHSD: Tensor, share: int, dtype: torch.dtype) -> None:
        shapes = [(*part.mask_bnQP.shape, length(part.keys)) for part in parts if part.mask_bnQP is not None]
        shapes = [(b, Q, K) for b, n, Q, _, K in shapes if n == 1] or [(0, 0, 0)]
        b, Q, K = (max(sizes) for sizes in zip(*shapes, strict=True))
        self.free_bQhK = q_BHSD.new_zeros(b, Q, share, K, dtype=dtype)  # beyond what is looked at, all is seen
        self.written = K  # from which column on it is
        self.rows = len(q_BHSD)

    def __call__(self, part: Part) -> Tensor | None:
        if part.mask_bnQP is None:
            return None
        b, n, Q, P = part.mask_bnQP.shape
        mask_bnQhP = part.mask_bnQP[:, :, :, None].expand(-1, -1, -1, self.free_bQhK.shape[2], -1)
        if n > 1:
            rows = self.rows if isinstance(part.rows, slice) else len(part.rows)
            mask = mask_bnQhP.expand(rows, -1, -1, -1, -1).flatten(2, 3).flatten(0, 1)[:, None]
            return mask.to(self.free_bQhK.dtype)
        at = self.free_bQhK.shape[3] - P
        self.free_bQhK[..., self.written : at] = 0
        self.free_bQhK[:b, :Q, :, at:] = mask_bnQhP[:, 0]
        self.written = at
        return self.free_bQhK[:b, :Q, :, -length(part.keys) :].flatten(1, 2)[:, None]
