"""Tiles from bounds against all pairs of the mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dlm_lightning.attention import bounds
from dlm_lightning.view import AUTOREGRESSIVE, Pattern, View, attention_mask, sees

PATTERNS = [Pattern(4, "clean"), Pattern(3, "clean", "causal"), Pattern(4), Pattern(None), AUTOREGRESSIVE]
ROWS = [[16], [5, 4, 3], [1, 1, 9], []]


def truth(view: View, size: int, window: int | None = None) -> bounds.Tiles:
    """Whether some and whether all pairs of each two tiles see each other, from the dense mask."""
    short = -view.ids_BS.shape[1] % size

    def tiled(fill: bool):
        mask_BSS = F.pad(attention_mask(view, window=window), (0, short, 0, short), value=fill)
        return mask_BSS.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)

    return bounds.Tiles(tiled(False).any(4).any(3), tiled(True).all(4).all(3))


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("size", [1, 3, 4, 16, 100])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_pair_is_missed_and_none_is_taken_unseen(make_batch, pattern, size, window):
    batch = make_batch(ROWS, length=16, starts={(1, 0): 37})
    masks = [batch.maskable_BL] * (2 if pattern.context == "clean" else pattern != AUTOREGRESSIVE)
    view = pattern.lay_out(batch, masks, 300)
    found, true = bounds.tiles(view, size, sees, window), truth(view, size, window)
    assert (found.some_BQT >= true.some_BQT).all() and (found.all_BQT <= true.all_BQT).all()
    exact = bounds.tiles(view, size, lambda q, k: sees(q, k), window)  # another predicate: from the pairs
    assert torch.equal(exact.some_BQT, true.some_BQT) and torch.equal(exact.all_BQT, true.all_BQT)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_tiles_of_whole_blocks_are_told_exactly(make_batch, pattern):
    batch = make_batch([[24], [24]], length=24)
    masks = [batch.maskable_BL] * (2 if pattern.context == "clean" else pattern != AUTOREGRESSIVE)
    view = pattern.lay_out(batch, masks, 300)
    found, true = bounds.tiles(view, 12), truth(view, 12)
    assert torch.equal(found.some_BQT, true.some_BQT)
    assert torch.equal(found.all_BQT & found.some_BQT, true.all_BQT)


coordinates = st.lists(st.integers(-1, 2), min_size=8, max_size=8)


@given(st.lists(coordinates, min_size=5, max_size=5), st.sampled_from([None, 1, 2]), st.sampled_from([2, 3]))
def test_any_coordinates(columns, window, size):
    position, rank, order, copy, document = (torch.tensor([column]) for column in columns)
    view = View(torch.zeros(1, 8, dtype=torch.long), position, rank, order, copy.abs(), document)
    found, true = bounds.tiles(view, size, sees, window), truth(view, size, window)
    assert (found.some_BQT >= true.some_BQT).all() and (found.all_BQT <= true.all_BQT).all()
