"""Attention tile by tile on CPUs: each tile of queries meets only the tiles of keys in which it sees something.

Shapes: B rows, b rows of one layout, S tokens of a row, H query heads, G key and value heads, K keys that a tile meets,
of which P are looked at pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlm_lightning import bfloat16
from dlm_lightning.attention import bounds, dense
from dlm_lightning.view import View, attention_mask

SIZE = 128  # tokens of a tile: fewer skip more pairs, more keep the kernel busy
HIDDEN = -1e30  # finite, because a query that sees no key of its own tiles must not become a NaN

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Tile(NamedTuple):
    """Queries at `span` of the `rows`, and the spans of keys that they meet, those that all of them see last.

    mask_b1SP: 0 where a query sees one of the first P keys, HIDDEN elsewhere; None where all are seen.
    """

    rows: slice | Tensor
    span: slice
    keys: list[slice]
    mask_b1SP: Tensor | None


@dataclass(frozen=True)
class Plan:
    """The tiles of a view [B, S] that looks at itself, for each sliding window that layers ask for."""

    view: View
    predicate: Callable[[View, View], Tensor]
    masked: dense.Plan  # for what the kernel has not
    tiles: dict[int | None, list[Tile]] = field(default_factory=dict)

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows that layers have asked for; None is without one."""
        return self.masked.windows | self.tiles.keys()

    def lay_out(self, window: int | None = None) -> list[Tile]:
        """The tiles of layers with this window."""
        if window not in self.tiles:
            self.tiles[window] = _tiles(self.view, self.predicate, window)
        return self.tiles[window]

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
        own = v_BGSD.dtype  # under autocast, rotary positions leave queries and keys in float32
        imitated = own == torch.bfloat16 and not bfloat16.in_hardware(v_BGSD.device)
        inputs = (x.to(torch.float32 if imitated else own) for x in (q_BHSD, k_BGSD, v_BGSD))
        return _Tiled.apply(*inputs, scaling, self.lay_out(window)).to(own)  # type: ignore[attr-defined]


def plan(view: View, predicate: Callable[[View, View], Tensor]) -> Plan | None:
    """The tiles of a view that looks at itself; None for one that is not on a CPU."""
    return Plan(view, predicate, dense.plan(view, predicate)) if view.ids_BS.is_cpu else None


def _tiles(view: View, predicate: Callable[[View, View], Tensor], window: int | None) -> list[Tile]:
    """All tiles; rows in which the same tiles see each other are attended together."""
    some_BQT, all_BQT = bounds.tiles(view, SIZE, predicate, window)
    some_BQT = some_BQT | torch.eye(some_BQT.shape[1], dtype=torch.bool, device=some_BQT.device)
    layouts: dict[str, list[int]] = {}
    relations = (some_BQT.long() + (some_BQT & all_BQT)).tolist()  # 0: unseen, 1: to be looked at, 2: seen
    for row, relation in enumerate(relations):
        layouts.setdefault(str(relation), []).append(row)
    found = []
    for rows_b in layouts.values():
        together = slice(None) if len(layouts) == 1 else torch.tensor(rows_b)
        own = view[together,]
        for number, relation_T in enumerate(relations[rows_b[0]]):
            span, length = slice(number * SIZE, (number + 1) * SIZE), view.ids_BS.shape[1]
            seen, looked = ([t for t, kind in enumerate(relation_T) if kind == which] for which in (2, 1))
            mask_b1SP = _mask(own, span, _spans(looked, length), predicate, window) if looked else None
            found.append(Tile(together, span, _spans(looked, length) + _spans(seen, length), mask_b1SP))
    return found


def _spans(tiles: Sequence[int], length: int) -> list[slice]:
    """Tiles in ascending order as spans, neighbours joined."""
    spans: list[slice] = []
    for tile in tiles:
        first, last = tile * SIZE, min((tile + 1) * SIZE, length)
        if spans and spans[-1].stop == first:
            first = spans.pop().start
        spans.append(slice(first, last))
    return spans


def _mask(view: View, queries: slice, spans: list[slice], predicate: Any, window: int | None) -> Tensor:
    keys_P = torch.cat([torch.arange(span.start, span.stop) for span in spans])
    seen_b1SP = attention_mask(view[:, queries], predicate, view[:, keys_P], window)[:, None]
    if torch.equal(seen_b1SP, seen_b1SP[:1].expand_as(seen_b1SP)):
        seen_b1SP = seen_b1SP[:1]
    return torch.zeros(seen_b1SP.shape).masked_fill_(~seen_b1SP, HIDDEN)


class _Tiled(torch.autograd.Function):
    """Torch's CPU kernel on each tile, of whose keys and mask nothing is kept for the backward pass; [B, S, H, D]."""

    @staticmethod
    def forward(ctx: Any, q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, scaling: float | None, tiles: list[Tile]):
        kv_2BGSD = torch.stack([k_BGSD, v_BGSD])
        out_BSHD = torch.empty_like(q_BHSD.transpose(1, 2), memory_format=torch.contiguous_format)
        meet = _Meeting(kv_2BGSD, q_BHSD.shape[1], tiles)
        kept = []
        for tile in tiles:
            q = _folded(q_BHSD[tile.rows, :, tile.span], k_BGSD.shape[1])
            k, v, mask = meet(tile)
            out, lse = _attend(q, k, v, 0.0, False, attn_mask=mask, scale=scaling)
            out_BSHD[tile.rows, tile.span] = _unfolded(out, q_BHSD.shape[1]).transpose(1, 2)
            kept += [q, out, lse]
        ctx.save_for_backward(kv_2BGSD, *kept)
        ctx.scaling, ctx.tiles, ctx.shape = scaling, tiles, q_BHSD.shape
        return out_BSHD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        kv_2BGSD, *kept = ctx.saved_tensors
        grad_BHSD, H = grad_outputs[0].transpose(1, 2), ctx.shape[1]
        dq_BHSD, dkv_2BGSD = kv_2BGSD.new_empty(ctx.shape), torch.zeros_like(kv_2BGSD)
        meet = _Meeting(kv_2BGSD, H, ctx.tiles)
        for number, tile in enumerate(ctx.tiles):
            q, out, lse = kept[3 * number : 3 * number + 3]
            k, v, mask = meet(tile)
            grad = _folded(grad_BHSD[tile.rows, :, tile.span], k.shape[1])
            dq, *dkv = _attend_backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=ctx.scaling)
            dq_BHSD[tile.rows, :, tile.span] = _unfolded(dq, H)
            first = 0
            for span in tile.keys:
                last = first + span.stop - span.start
                for total_BGSD, part in zip(dkv_2BGSD, dkv, strict=True):
                    total_BGSD[tile.rows, :, span] += part[:, :, first:last]
                first = last
        return dq_BHSD, *dkv_2BGSD, None, None


class _Meeting:
    """Gathers the keys and values that a tile meets, and its mask, for query heads that lie one behind the other."""

    def __init__(self, kv_2BGSD: Tensor, heads: int, tiles: list[Tile]) -> None:
        self.kv_2BGSD, self.share = kv_2BGSD, heads // kv_2BGSD.shape[2]
        most = max(sum(span.stop - span.start for span in tile.keys) for tile in tiles)
        rows = max((tile.mask_b1SP.shape[0] for tile in tiles if tile.mask_b1SP is not None), default=1)
        self.free = kv_2BGSD.new_zeros(rows, 1, self.share, SIZE, most)  # beyond what is looked at, all is seen
        self.looked = 0  # columns of it that were written last

    def __call__(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor | None]:
        k, v = torch.cat([self.kv_2BGSD[:, tile.rows, :, span] for span in tile.keys], 3)
        if tile.mask_b1SP is None:
            return k, v, None
        b, _, S, P = tile.mask_b1SP.shape
        mask = self.free[:b, :, :, :S, : k.shape[2]]
        self.free[..., P : self.looked] = 0
        mask[..., :P] = tile.mask_b1SP[:, :, None]
        self.looked = P
        return k, v, mask.flatten(2, 3)


def _folded(x_bHSD: Tensor, groups: int) -> Tensor:
    """[b, H, S, D] as [b, G, S·H/G, D]."""
    return x_bHSD.unflatten(1, (groups, -1)).flatten(2, 3)


def _unfolded(x_bGSD: Tensor, heads: int) -> Tensor:
    """Back to [b, H, S, D]."""
    share = heads // x_bGSD.shape[1]
    return x_bGSD.unflatten(2, (share, -1)).flatten(1, 2)
