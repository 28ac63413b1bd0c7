"""Which masks are filled in, against loops over each row."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlm_lightning.decode.canvas import Canvas
from dlm_lightning.decode.selector import LeftToRight, RandomOrder, Schedule, Threshold, surest

MASK = 300


def canvas(lengths: list[int], new: int = 8, block: int | None = 4) -> Canvas:
    return Canvas([[1] * n for n in lengths], new, block, None, MASK, False, torch.device("cpu"))


@given(st.lists(st.lists(st.sampled_from([-math.inf, 0.1, 0.5, 0.5, 0.9, 1.0]), min_size=5, max_size=5), min_size=1))
def test_the_surest_are_the_highest_and_of_equal_ones_the_first(scores):
    count = [n % 4 for n in range(len(scores))]
    found = surest(torch.tensor(scores), torch.tensor(count))
    for row, (numbers, n) in enumerate(zip(scores, count, strict=True)):
        order = sorted((i for i in range(5) if numbers[i] > -math.inf), key=lambda i: (-numbers[i], i))
        assert found[row].nonzero().flatten().tolist() == sorted(order[:n])


@given(
    st.lists(st.floats(0, 1), min_size=4, max_size=4), st.sampled_from([0.2, 0.9, 1.0]), st.sampled_from([None, 1, 2])
)
def test_threshold(scores, threshold, at_most):
    filled = Threshold(threshold, at_most).choose(torch.tensor([[-math.inf] * 4 + scores]), canvas([4], 4))
    scores = torch.tensor(scores).tolist()
    above = sorted((i for i in range(4) if scores[i] > threshold), key=lambda i: (-scores[i], i))[:at_most]
    expected = above or [max(range(4), key=lambda i: (scores[i], -i))]
    assert [i - 4 for i in filled[0].nonzero().flatten().tolist()] == sorted(expected)


def fill(selector, state: Canvas, score: Callable[[], torch.Tensor]) -> list[list[int]]:
    """Tokens that each forward fills in, by row, until all rows are full."""
    counts = []
    while state.masked_BL.any():
        may = selector.candidates(state)
        assert not (may & ~state.open_BL).any() and (may.any(1) | ~state.masked_BL.any(1)).all()
        state.show(state.position_L < state.reach_B[:, None])
        chosen = selector.choose(torch.where(may, score(), -math.inf), state)
        assert not (chosen & ~may).any()
        counts.append(chosen.sum(1).tolist())
        state.commit(chosen, torch.zeros_like(state.ids_BL))
    return counts


def test_a_schedule_fills_a_block_in_equal_shares():
    """The first block of row 1 has one mask only; its others, of four and three, take 2 forwards each, as row 0's."""
    counts = fill(Schedule(2), canvas([4, 3]), lambda: torch.rand(2, 12))
    assert [a for a, _ in counts] == [2, 2, 2, 2, 0] and [b for _, b in counts] == [1, 2, 2, 2, 1]
    assert [a for [a] in fill(Schedule(3), canvas([8], 8, 8), lambda: torch.rand(1, 16))] == [3, 3, 2]
    assert [a for [a] in fill(Schedule(99), canvas([8], 8, 8), lambda: torch.rand(1, 16))] == [1] * 8


def test_left_to_right():
    state = canvas([4, 3])
    assert LeftToRight(2).candidates(state).nonzero().tolist() == [[0, 4], [0, 5], [1, 3]]
    assert [a for a, _ in fill(LeftToRight(3), state, lambda: torch.rand(2, 12))] == [3, 1, 3, 1]


def test_a_random_order_is_known_beforehand_and_the_same_whatever_lies_beside():
    one, other = (RandomOrder(2, seed) for seed in (0, 1))
    alone, among = canvas([8], 8, 8), canvas([8, 5, 9], 8, 8)
    assert one.candidates(alone).sum() == 2
    assert torch.equal(one.candidates(alone)[0], one.candidates(among)[0, :16])
    orders = []
    for selector in (one, other):
        state, order = canvas([8], 8, 8), []
        while state.masked_BL.any():
            order += selector.candidates(state)[0].nonzero().flatten().tolist()
            state.commit(selector.candidates(state), torch.zeros_like(state.ids_BL))
        assert sorted(order) == list(range(8, 16)) and order != sorted(order)
        orders.append(order)
    assert orders[0] != orders[1]


@pytest.mark.parametrize(
    "make",
    [
        *(lambda value=value: Threshold(value) for value in (0.0, -0.5, 1.01, float("nan"))),
        lambda: Threshold(0.9, at_most=0),
        lambda: Schedule(0),
        lambda: LeftToRight(0),
        lambda: RandomOrder(0),
    ],
)
def test_what_fills_nothing_in_is_refused(make):
    with pytest.raises(ValueError, match=r"must (lie in \(0, 1\]|be at least 1)"):
        make()
