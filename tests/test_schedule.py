"""Block sizes over the steps, and what the recipes make of them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.recipes.complementary_mask import ComplementaryMask
from dlm_lightning.schedule import BlockSchedule
from dlm_lightning.view import Pattern, groups


def test_growing_gives_each_size_an_equal_share_in_order_and_then_the_recipes_own():
    schedule = BlockSchedule(sizes=(4, 8, 16), steps=30)
    assert [schedule.size(step, seed=0) for step in range(32)] == [4] * 10 + [8] * 10 + [16] * 10 + [None] * 2
    assert [BlockSchedule((2, 4), steps=3).size(step, 0) for step in range(4)] == [2, 2, 4, None]


def test_mixed_draws_each_size_about_equally_often_by_step_and_seed():
    schedule = BlockSchedule(sizes=(4, 8, 16), steps=3000, order="mixed")
    drawn = [schedule.size(step, seed=1) for step in range(3000)]
    assert set(drawn) == {4, 8, 16} and all(abs(n - 1000) < 120 for n in Counter(drawn).values())
    assert drawn == [schedule.size(step, seed=1) for step in range(3000)]
    assert drawn != [schedule.size(step, seed=2) for step in range(3000)]
    assert drawn[:6] != drawn[3:9]


@pytest.mark.parametrize("recipe_class", [BlockCausal, ComplementaryMask])
def test_a_step_is_laid_out_by_its_block_size_and_validation_by_the_models(recipe_class, make_recipe, make_batch):
    batch = make_batch([[13, 3]])
    schedule = BlockSchedule(sizes=(1, 4), steps=8)
    for step, size in [(0, 1), (5, 4), (8, 6), (100, 6)]:
        recipe = make_recipe(recipe_class, step=step, block_size=6, block_schedule=schedule)
        assert recipe.train_pattern == Pattern(size, "clean") and recipe.pattern == Pattern(6, "clean")
        view = recipe.show(batch, recipe.corrupt(batch, recipe.train_pattern), recipe.train_pattern)
        assert torch.equal(view.rank_BS[:, :16], batch.position_BL // size * size)
        expected = groups(batch.position_BL, batch.document_BL, 6)
        mine = recipe.draw(recipe.noise, batch, recipe.pattern)
        blocks = expected.unique().tolist()
        assert {int(expected[0, n]) for n in mine.mask_BL[0].nonzero().flatten()} <= set(blocks)


def test_without_a_schedule_the_pattern_is_the_models(make_recipe):
    assert make_recipe(BlockCausal, block_size=6).train_pattern == Pattern(6, "clean")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sizes": (), "steps": 4}, r"block_schedule.sizes must be block sizes of at least 1, not \[\]"),
        ({"sizes": (0, 4), "steps": 4}, r"at least 1, not \[0, 4\]"),
        ({"sizes": (8, 4), "steps": 4}, r"must ascend where the order is growing, not \[8, 4\]"),
        ({"sizes": (4, 4), "steps": 4}, r"must ascend"),
        ({"sizes": (4, 8, 16), "steps": 2}, r"block_schedule.steps must be at least the 3 sizes, not 2"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        BlockSchedule(**options)
    if options["sizes"] == (8, 4):
        assert BlockSchedule(**options, order="mixed").sizes == (8, 4)
