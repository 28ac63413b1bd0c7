"""What is attended together: every pair that sees, once, in as few parts as rows and copies allow."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning.attention.parts import HIDDEN, SIZE, Part, parts
from dlm_lightning.view import AUTOREGRESSIVE, Pattern, View, attention_mask, sees

MASK = 300
ROWS = [[300], [110, 150], [7] * 40, [], [300]]
PATTERNS = [
    Pattern(16, "clean"),
    Pattern(64, "clean"),
    Pattern(7, "clean", "causal"),
    Pattern(16),
    Pattern(None),
    AUTOREGRESSIVE,
]


def view_of(make_batch, pattern: Pattern, rows=ROWS, length: int = 300, copies: int = 2) -> View:
    batch = make_batch(rows, length=length)
    copies = copies if pattern.context == "clean" else int(pattern != AUTOREGRESSIVE)
    return pattern.lay_out(batch, [batch.maskable_BL & (batch.u_BL < p) for p in (0.4, 0.7)[:copies]], MASK)


def met(part: Part, view: View):
    """By rows and pieces: the queries and keys of a part, and which of these pairs its mask leaves."""
    rows = torch.arange(len(view.ids_BS))[part.rows]
    at_nQ, at_nK = (
        torch.cat([torch.arange(span.start, span.stop) for span in spans]).view(part.pieces, -1)
        for spans in (part.queries, part.keys)
    )
    seen_bnQK = torch.ones(len(rows), *at_nQ.shape, at_nK.shape[1], dtype=torch.bool)
    if part.mask_bnQP is not None:
        assert ((part.mask_bnQP == 0) | (part.mask_bnQP == torch.tensor(HIDDEN))).all()
        seen_bnQK[..., -part.mask_bnQP.shape[3] :] = part.mask_bnQP == 0
    return rows, at_nQ, at_nK, seen_bnQK


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_query_meets_all_that_it_sees_and_each_key_once(make_batch, pattern, window):
    view = view_of(make_batch, pattern)
    B, S = view.ids_BS.shape
    times_BSS, seen_BSS = torch.zeros(B, S, S), torch.zeros(B, S, S, dtype=torch.bool)
    placed_BS = torch.zeros(B, S)
    for part in parts(view, sees, window):
        rows, at_nQ, at_nK, seen_bnQK = met(part, view)
        where = rows[:, None, None, None], at_nQ[None, :, :, None], at_nK[None, :, None, :]
        times_BSS[where] += 1
        seen_BSS[where] |= seen_bnQK
        if part.pieces == 1:
            placed_BS[rows[:, None], at_nQ] += 1
        else:
            assert (placed_BS[rows[:, None], at_nQ.flatten()] == 1).all()  # there is something to add to
    assert (placed_BS == 1).all() and times_BSS.max() == 1
    assert torch.equal(seen_BSS, attention_mask(view, sees, None, window))


def test_rows_shorter_than_a_tile_are_one_part(make_batch):
    view = view_of(make_batch, Pattern(4, "clean"), [[12], [5, 7]], length=12)
    [part] = parts(view, sees)
    assert (part.queries, part.keys, part.pieces) == ([slice(0, 36)], [slice(0, 36)], 1)


@pytest.mark.parametrize("size, piece", [(1, 32), (16, 32), (32, 32), (64, 64), (100, None), (128, None)])
def test_noisy_blocks_are_apart_in_the_smallest_pieces_that_hold_them(make_batch, size, piece):
    """384 tokens are three tiles a copy, of which the clean one's blocks see what is before them."""
    view = view_of(make_batch, Pattern(size, "clean"), [[384]], length=384)
    apart = [part for part in parts(view, sees) if part.pieces > 1]
    assert [[slice(0, 2 * 384)]] * (piece is not None) == [part.queries for part in apart]
    assert all(part.keys == part.queries and part.pieces == 2 * 384 // piece for part in apart)


def test_all_copies_of_a_place_meet_its_clean_context_together(make_batch):
    view = view_of(make_batch, Pattern(16, "clean"), [[384]], length=384)
    whole = [part for part in parts(view, sees) if part.pieces == 1]
    assert len(whole) == 384 // SIZE
    for number, part in enumerate(whole):
        first = number * SIZE
        assert part.queries == [slice(copy * 384 + first, copy * 384 + first + SIZE) for copy in range(3)]
        assert sorted(span.start for span in part.keys)[0] == 2 * 384
        assert max(span.stop for span in part.keys) == 2 * 384 + first + SIZE


def test_rows_of_one_layout_are_attended_together(make_batch):
    for rows, layouts in (([[300], [300]], 1), ([[140, 160]] * 3, 1), (ROWS, 3)):
        view = view_of(make_batch, AUTOREGRESSIVE, rows)
        found = parts(view, sees)
        assert len({str(part.rows) for part in found}) == layouts
        if layouts == 1:
            assert len(found) == -(-300 // SIZE) and all(part.rows == slice(None) for part in found)
