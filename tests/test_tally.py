"""What a step is measured by, against plain loops over tokens."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch

from dlm_lightning.noise import Noise
from dlm_lightning.recipes.ar_source import ArSource
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.recipes.complementary_mask import ComplementaryMask
from dlm_lightning.recipes.full_bidirectional import FullBidirectional
from dlm_lightning.tally import NAMES, Tally

PER_DOCUMENT = Noise(masking="tilted", weight="inverse_t", t_per="document")
RECIPES = {
    "blocks": (BlockCausal, {"block_size": 4}, 2),
    "documents": (BlockCausal, {"block_size": 4, "noise": PER_DOCUMENT}, 2),
    "one block per document": (FullBidirectional, {}, 1),
    "complementary copies": (ComplementaryMask, {"block_size": 4}, 3),
    "an AR loss beside": (BlockCausal, {"block_size": 4, "context_rank": "causal", "ar_weight": 0.5}, 2),
}


def share_name(masked: int, maskable: int) -> str:
    """The name of the part of (0, 1] that a share lies in."""
    return next(name for name in NAMES if masked / maskable <= float(name.split("-")[1]))


def tallied(recipe, *batches) -> Tally:
    recipe._tally = None
    for batch in batches:
        recipe.training_step(batch, 0)
    return Tally.read(recipe._tally)


@pytest.mark.parametrize("name", RECIPES)
def test_counts_and_cross_entropies_are_those_of_a_loop_over_tokens(name, make_recipe, make_batch):
    recipe_class, options, all_copies = RECIPES[name]
    recipe = make_recipe(recipe_class, **options)
    batches = [
        make_batch([[16], [9, 7]], length=16, starts={(0, 0): 6}, prompts={(1, 0): 3}),
        make_batch([[5, 8], []], length=16, seed=3),
    ]
    terms, scored = defaultdict(list), 0
    for batch in batches:
        copies = recipe.corrupt(batch, recipe.pattern)
        view = recipe.show(batch, copies, recipe.pattern)
        B, L = batch.ids_BL.shape
        S = view.ids_BS.shape[1]
        for c, (mask_BL, _) in enumerate(copies):
            members = defaultdict(list)
            for b in range(B):
                for i in range(L):
                    block = (
                        int(batch.position_BL[b, i]) // 4 if name not in ("documents", "one block per document") else 0
                    )
                    if batch.maskable_BL[b, i]:
                        members[b, int(batch.document_BL[b, i]), block].append(i)
            for (b, *_), tokens in members.items():
                masked = [i for i in tokens if mask_BL[b, i]]
                for i in masked:
                    with torch.no_grad():
                        at = torch.tensor([b * S + c * L + i])
                        nll = recipe.denoiser(view, at, batch.ids_BL[b, i : i + 1]).item()
                    terms[share_name(len(masked), len(tokens))].append(nll)
        scored += sum(int(mask_BL.sum()) for mask_BL, _ in copies)
        scored += int(batch.maskable_BL.sum()) if recipe.ar_weight else 0
    found = tallied(recipe, *batches)
    assert len(terms) > 1
    for name in NAMES:
        expected = sum(terms[name]) / len(terms[name]) if terms[name] else math.nan
        assert found.masked_ce[name] == pytest.approx(expected, rel=1e-5, nan_ok=True), name
    assert (found.data, found.scored, found.forward) == (16 + 16 + 13, scored, 4 * 16 * all_copies)
    assert found.maskable == 15 + (16 - 3 - 1) + (13 - 2)


def test_a_recipe_that_masks_nothing_has_no_levels(make_recipe, make_batch):
    found = tallied(make_recipe(ArSource), make_batch([[5, 8], [4]], length=16))
    assert found.masked_ce == {}
    assert (found.data, found.scored, found.forward) == (17, 14, 32)


def test_ranks_add_up_to_the_means_over_all_their_tokens(make_recipe, make_batch):
    recipe = make_recipe(ComplementaryMask, block_size=4)
    batches = [make_batch([[16], [9, 7]], seed=n) for n in range(4)]
    vectors = []
    for mine in (batches[:2], batches[2:]):
        tallied(recipe, *mine)
        vectors.append(recipe._tally)
    added, whole = Tally.read(sum(vectors)), tallied(recipe, *batches)
    torch.testing.assert_close(added.masked_ce, whole.masked_ce, rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(added[:5], whole[:5], rtol=1e-5, atol=0)


def test_the_logged_gradient_norm_is_that_of_the_mean_before_clipping(make_recipe, make_batch):
    recipe = make_recipe(BlockCausal, block_size=4)
    logged = {}
    recipe.log = lambda name, value, **_: logged.update({name: float(value)})
    recipe.training_step(make_batch([[16], [9, 7]]), 0).backward()
    recipe.on_before_optimizer_step(torch.optim.AdamW(recipe.parameters(), fused=True))
    every = torch.cat([p.grad.flatten() for p in recipe.denoiser.parameters()]).double()
    assert logged["train/grad_norm"] == pytest.approx(every.norm().item(), rel=1e-5)
    assert torch.nn.utils.clip_grad_norm_(recipe.denoiser.parameters(), 1.0) == pytest.approx(
        logged["train/grad_norm"], rel=1e-6
    )
