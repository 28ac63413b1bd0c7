"""The baselines compute what the recipes' own steps compute: loss and gradients."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning import attention
from dlm_lightning.bench import baselines
from dlm_lightning.bench.baselines import BASELINES
from dlm_lightning.loss import score, weighted_sum
from dlm_lightning.recipes.ar_source import ArSource
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.recipes.complementary_mask import ComplementaryMask
from dlm_lightning.recipes.full_bidirectional import FullBidirectional
from dlm_lightning.source import build, build_config

RECIPES = [
    (BlockCausal, {"block_size": 4}),
    (BlockCausal, {"block_size": 4, "shift": "next_token"}),
    (BlockCausal, {"block_size": 4, "shift": "next_token", "first_token": "noisy"}),
    (BlockCausal, {"block_size": 4, "context": "noisy"}),
    (ComplementaryMask, {"block_size": 4}),
    (ComplementaryMask, {"block_size": 4, "shift": "none", "context_rank": "causal", "ar_weight": 0.5}),
    (FullBidirectional, {}),
    (FullBidirectional, {"ar_weight": 0.5}),
    (ArSource, {}),
]
PACKED = [[9, 6], [14], [3, 4, 5]]


@pytest.fixture
def gradients():
    """`gradients(recipe, loss)`: a loss and the gradients that it gives, by name."""

    def compute(recipe, loss):
        recipe.denoiser.zero_grad()
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in recipe.denoiser.named_parameters()}

    return compute


def own_loss(recipe, batch):
    copies = recipe.noisy(batch, recipe.pattern)
    view = recipe.show(batch, copies, recipe.pattern)
    scored = score(batch, view, copies, recipe.ar_weight)
    return weighted_sum(recipe.denoiser(view, scored.index_N, scored.target_N), scored.weight_N)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize(("recipe_class", "options"), RECIPES)
@pytest.mark.parametrize("documents", [PACKED, [[16], [16]]], ids=["packed", "whole"])
def test_a_baseline_gives_the_recipes_loss_and_gradients(
    baseline, recipe_class, options, documents, make_recipe, make_batch, gradients, assert_same
):
    recipe = make_recipe(recipe_class, **options)
    batch = make_batch(documents, 16)
    loss = BASELINES[baseline]()(recipe, batch)
    expected = gradients(recipe, own_loss(recipe, batch))
    found = gradients(recipe, loss)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert_same(found, expected, error=1e-4)


def shown(recipe):
    """The shapes of what the network and its head are given."""
    shapes: dict[str, torch.Size] = {}
    network = recipe.denoiser.network
    network.base_model.register_forward_pre_hook(
        lambda _, __, given: shapes.update(ids=given["input_ids"].shape), with_kwargs=True
    )
    network.get_output_embeddings().register_forward_pre_hook(lambda _, given: shapes.update(head=given[0].shape))
    return shapes


def test_complementary_copies_are_doubled_along_the_batch(make_recipe, make_batch):
    recipe, batch = make_recipe(ComplementaryMask), make_batch(PACKED, 16)
    shapes = shown(recipe)
    BASELINES["peers"]()(recipe, batch)
    assert shapes == {"ids": (6, 32), "head": (6, 32, 32)}
    BASELINES["fair"]()(recipe, batch)
    assert shapes == {"ids": (6, 32), "head": (batch.maskable_BL.sum(), 32)}


def test_only_the_fair_baseline_keeps_its_mask(make_recipe, make_batch, monkeypatch):
    recipe, batch = make_recipe(BlockCausal, block_size=4), make_batch([[16], [16]], 16)
    made = []

    def mask(*args):
        made.append(args)
        return attention_mask(*args)

    attention_mask = baselines.attention_mask
    monkeypatch.setattr(baselines, "attention_mask", mask)
    fair, peers = BASELINES["fair"](), BASELINES["peers"]()
    for loss, masks in ((fair, 1), (peers, 3)):
        made.clear()
        for _ in range(3):
            loss(recipe, batch)
        assert len(made) == masks
    made.clear()
    fair(recipe, make_batch([[5, 11], [16]], 16))  # laid out in another way
    [(view, _)] = made
    assert len(view.ids_BS) == 2


def test_rows_that_lie_alike_share_a_mask(make_recipe, make_batch):
    recipe = make_recipe(ComplementaryMask, block_size=4)
    for documents, masks in (([[16], [16]], 1), (PACKED, 6)):
        view, _ = baselines._lay_out(recipe, make_batch(documents, 16))
        assert baselines._dense_mask(recipe, view).mask_R1SS.shape == (masks, 1, 32, 32)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_layers_that_need_more_than_a_mask_are_refused(family, source_folder, make_batch):
    recipe = BlockCausal(source=str(source_folder(family)))
    recipe.configure_model()
    with pytest.raises(ValueError, match="a baseline has no sliding windows"):
        BASELINES["peers"]()(recipe, make_batch([[16]], 16))


def test_logits_that_are_scaled_are_refused(make_recipe, make_batch):
    recipe = make_recipe(BlockCausal)
    config = build_config({"model_type": "granite", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 301})
    config.num_attention_heads = config.num_key_value_heads = 4
    config.intermediate_size, config.logits_scaling, config.pad_token_id = 48, 8.0, None
    recipe.denoiser = recipe.wrap(build(config, None, attention.NAME))
    with pytest.raises(ValueError, match="neither scales nor caps"):
        BASELINES["fair"]()(recipe, make_batch([[16]], 16))
