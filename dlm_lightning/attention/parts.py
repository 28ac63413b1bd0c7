"""What is attended together on a CPU: parts of a view, each for one call of a kernel, told tile by tile.

A tile of queries meets the tiles of keys in which it sees something, and tiles that meet the same keys are one part.
What a noisy copy sees of itself lies in blocks on the diagonal. These are parts of their own, so that of all copies of
a place the same clean context is left to meet; attention over both is merged by log-sum-exp.

Shapes: B rows, b rows that are laid out alike, S tokens of a row, T tiles of it, t smaller ones in one. A part has n
pieces, of which each has Q queries and K keys, the last P of them looked at pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dlm_lightning.attention import bounds
from dlm_lightning.view import View, attention_mask

SIZE = 128  # tokens of a tile: fewer skip more pairs, more keep the kernel busy
BLOCKS = (32, 64)  # tokens of a piece on the diagonal: the first that holds what is seen
TOGETHER = 4  # tiles of queries at most, so that a mask stays small
HIDDEN = -1e30  # finite, because a query that sees no key of a part must not become a NaN

Predicate = Callable[[View, View], Tensor]


class Part(NamedTuple):
    """Queries of the `rows` and the keys that they meet, as spans of tokens, in n `pieces` of which each meets its own.

    mask_bnQP: 0 where a query sees one of the last P keys, HIDDEN elsewhere; None where all are seen.
    """

    rows: slice | Tensor
    queries: list[slice]
    keys: list[slice]
    mask_bnQP: Tensor | None
    pieces: int = 1


def parts(view: View, predicate: Predicate, window: int | None = None) -> list[Part]:
    """The parts of a view [B, S] that looks at itself, under a predicate and a sliding window.

    Those in one piece come first, and each query is in one of them; those on the diagonal add to what it found there.
    """
    some_BTT, all_BTT = bounds.tiles(view, SIZE, predicate, window)
    some_BTT = some_BTT | torch.eye(some_BTT.shape[1], dtype=torch.bool)
    alone_BT = all_BTT.diagonal(dim1=1, dim2=2) | (some_BTT.sum(2) == 1)
    relation_BTT = (some_BTT.long() + (some_BTT & all_BTT)).tolist()  # 0: unseen, 1: to be looked at, 2: seen
    block_BT = _blocks(view, predicate, window).masked_fill(alone_BT, 0).tolist()
    alike: dict[str, list[int]] = {}
    for row, layout in enumerate(zip(relation_BTT, block_BT, strict=True)):
        alike.setdefault(str(layout), []).append(row)
    found = []
    for rows_b in alike.values():
        rows = slice(None) if len(alike) == 1 else torch.tensor(rows_b)
        first, see = rows_b[0], _Seen(view[rows,], predicate, window)
        found += [part._replace(rows=rows) for part in _of_layout(see, relation_BTT[first], block_BT[first])]
    return sorted(found, key=lambda part: part.pieces > 1)


def length(spans: Sequence[slice]) -> int:
    """The tokens of spans together."""
    return sum(span.stop - span.start for span in spans)


def _blocks(view: View, predicate: Predicate, window: int | None) -> Tensor:
    """The first of BLOCKS outside of which, on the diagonal, a tile sees nothing of itself, else 0; [B, T]."""
    B, S = view.ids_BS.shape
    whole = S // SIZE
    block_BT = torch.zeros(B, -(-S // SIZE), dtype=torch.long)
    if not whole:
        return block_BT
    own = _cut(view, [slice(0, whole * SIZE)], whole)
    for size in reversed(BLOCKS):
        some_Ntt = bounds.tiles(own, size, predicate, window).some_BQT
        outside_N = (some_Ntt & ~torch.eye(SIZE // size, dtype=torch.bool)).flatten(1).any(1)
        block_BT[:, :whole].masked_fill_(~outside_N.view(B, whole), size)
    return block_BT


def _cut(view: View, spans: list[slice], pieces: int) -> View:
    """Spans of a view, in so many pieces that are rows of their own."""
    at_N = torch.cat([torch.arange(span.start, span.stop) for span in spans])
    cut = (x_BS[:, at_N].reshape(len(x_BS) * pieces, -1) for x_BS in view.coordinates)
    ids, position, rank, order, copy, document = cut
    return View(ids, position, rank, order, copy, document)


class _Seen(NamedTuple):
    """Rows that are laid out alike, and what decides who sees whom in them."""

    view: View
    predicate: Predicate
    window: int | None

    def mask(self, queries: list[slice], keys: list[slice], pieces: int = 1) -> Tensor | None:
        """The mask [b or 1, n, Q, P] of queries and keys, None if there are none."""
        if not keys:
            return None
        q, k = (_cut(self.view, spans, pieces) for spans in (queries, keys))
        seen_bnQP = attention_mask(q, self.predicate, k, self.window).unflatten(0, (-1, pieces))
        if torch.equal(seen_bnQP, seen_bnQP[:1].expand_as(seen_bnQP)):
            seen_bnQP = seen_bnQP[:1]
        return torch.zeros(seen_bnQP.shape).masked_fill_(~seen_bnQP, HIDDEN)


def _of_layout(see: _Seen, relation_TT: list[list[int]], block_T: list[int]) -> list[Part]:
    """The parts of rows that are laid out alike."""
    S = see.view.ids_BS.shape[1]
    groups: dict[tuple[int, ...], list[int]] = {}
    for tile, kinds in enumerate(relation_TT):
        met = tuple(t for t, kind in enumerate(kinds) if kind and not (t == tile and block_T[tile]))
        groups.setdefault(met, []).append(tile)
    found = []
    for met, tiles in groups.items():
        for some in (tiles[n : n + TOGETHER] for n in range(0, len(tiles), TOGETHER)):
            looked = [t for t in met if any(relation_TT[tile][t] == 1 for tile in some)]
            queries, last = _spans(some, S), _spans(looked, S)
            keys = _spans([*(t for t in met if t not in looked), *looked], S)
            found.append(Part(slice(None), queries, keys, see.mask(queries, last)))
    for size in BLOCKS:
        if own := _spans([tile for tile, block in enumerate(block_T) if block == size], S):
            pieces = length(own) // size
            found.append(Part(slice(None), own, own, see.mask(own, own, pieces), pieces))
    return found


def _spans(tiles: Sequence[int], S: int) -> list[slice]:
    """Tiles as spans, those that follow one another joined."""
    spans: list[slice] = []
    for tile in tiles:
        first, last = tile * SIZE, min((tile + 1) * SIZE, S)
        if spans and spans[-1].stop == first:
            first = spans.pop().start
        spans.append(slice(first, last))
    return spans
