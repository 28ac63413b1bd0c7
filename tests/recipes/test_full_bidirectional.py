"""FullBidirectional: the loss once more with loops and a plain network, and causal annealing."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning.noise import NELBO, Noise
from dlm_lightning.recipes.full_bidirectional import FullBidirectional
from dlm_lightning.view import AUTOREGRESSIVE, Pattern, attention_mask

LENGTH = 12


def by_hand(recipe, batch, plain_logits, noise: Noise, mask: torch.Tensor) -> float:
    ids = batch.ids_BL[0]
    mask_L, weight_L = (x[0] for x in recipe.draw(noise, batch, Pattern(None)))
    shown = torch.where(mask_L, 300, ids)
    logp = plain_logits(recipe.denoiser, shown, torch.arange(LENGTH), mask)[:, :300].log_softmax(1)
    reads = range(-1, LENGTH - 1) if recipe.shift == "next_token" else range(LENGTH)
    terms = [weight_L[i].item() * logp[reads[i], ids[i]].item() for i in range(LENGTH) if mask_L[i]]
    assert terms
    return -sum(terms)


@pytest.mark.parametrize("shift", ["none", "next_token"])
def test_training_and_validation_by_hand(make_recipe, make_batch, plain_logits, validated, shift):
    recipe = make_recipe(FullBidirectional, shift=shift)
    batch = make_batch([[LENGTH]])
    everything = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    assert (recipe.noise.masking, recipe.noise.weight, recipe.noise.t_per) == ("bernoulli", "inverse_p", "document")
    loss = recipe.training_step(batch, 0).item()
    assert loss == pytest.approx(by_hand(recipe, batch, plain_logits, recipe.noise, everything), rel=1e-5)
    nelbo = by_hand(recipe, batch, plain_logits, NELBO, everything) / (LENGTH - 1)
    assert validated(recipe, batch)["nelbo"] == pytest.approx(nelbo, rel=1e-5)


def test_annealing_goes_from_causal_to_full_by_growing_blocks(make_recipe):
    recipe = make_recipe(FullBidirectional, annealing_steps=8)  # on rows of 16 tokens
    sizes = []
    for step in range(10):
        recipe._trainer.global_step = step
        assert recipe.pattern == Pattern(None)
        assert recipe.train_pattern.context == "noisy"
        sizes.append(recipe.train_pattern.block_size)
    assert sizes[0] == 1 and sizes[4] == 4 and sizes[8:] == [None, None]
    assert sizes[:8] == sorted(sizes[:8]) and 8 <= sizes[7] <= 16
    assert make_recipe(FullBidirectional).train_pattern == Pattern(None)


def test_annealing_starts_with_the_sources_attention_and_validates_the_final_one(
    make_recipe, make_batch, plain_logits, validated
):
    batch = make_batch([[LENGTH]])
    recipe = make_recipe(FullBidirectional, annealing_steps=8)
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    view = recipe.show(batch, recipe.corrupt(batch, recipe.train_pattern), recipe.train_pattern)
    assert torch.equal(attention_mask(view), attention_mask(AUTOREGRESSIVE.lay_out(batch, [], 300)))
    loss = recipe.training_step(batch, 0).item()
    assert loss == pytest.approx(by_hand(recipe, batch, plain_logits, recipe.noise, causal), rel=1e-5)
    final = make_recipe(FullBidirectional)
    assert validated(recipe, batch) == validated(final, batch)
    assert final.training_step(batch, 0).item() != pytest.approx(loss, rel=1e-3)


def test_an_ar_weight_adds_the_ar_loss(make_recipe, make_batch, validated):
    batch = make_batch([[LENGTH, 4], [9]], length=17)
    plain, with_ar = (make_recipe(FullBidirectional, ar_weight=w) for w in (0.0, 0.3))
    difference = with_ar.training_step(batch, 0).item() - plain.training_step(batch, 0).item()
    assert difference == pytest.approx(
        0.3 * validated(plain, batch)["ar_nll"] * batch.maskable_BL.sum().item(), rel=1e-4
    )


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="annealing_steps must be at least 0"):
        FullBidirectional(source="anything", annealing_steps=-1)
    with pytest.raises(ValueError, match=r"noise.masking: complementary does not go with FullBidirectional"):
        FullBidirectional(source="anything", noise=Noise("complementary", "one"))
