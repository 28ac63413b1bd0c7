"""The gradient's variance against the covariance of gradients that are all kept."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning.gradient_noise import STREAM, gradient_noise
from dlm_lightning.likelihood import redrawn
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.recipes.complementary_mask import ComplementaryMask


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("recipe_class", [BlockCausal, ComplementaryMask])
def test_it_is_the_trace_of_the_covariance(recipe_class, views, make_recipe, make_batch, loss_and_gradients):
    recipe, draws = make_recipe(recipe_class, block_size=4, views=views), 3
    batches = [make_batch([[16], [7, 9]], length=16, seed=seed) for seed in (0, 1, 2)]
    found = gradient_noise(recipe, batches, draws)

    def gradient(batch, draw):
        noisy = redrawn(batch, 0, STREAM, draw)[0]
        _, by_name = loss_and_gradients(recipe.denoiser, noisy, recipe.noisy(noisy, recipe.pattern), recipe.pattern)
        return torch.cat([g.flatten() for g in by_name.values()]).double() / batch.maskable_BL.sum()

    all_BDP = torch.stack([torch.stack([gradient(batch, draw) for draw in range(draws)]) for batch in batches])
    noise = all_BDP.var(1).sum(1).mean().item()
    means = all_BDP.mean(1)
    assert found.noise == pytest.approx(noise, rel=1e-4)
    assert found.data == pytest.approx(means.var(0).sum().item() - noise / draws, rel=1e-4)
    assert found.square == pytest.approx(means.mean(0).square().sum().item() - means.var(0).sum().item() / 3, rel=1e-3)


def test_one_of_either_is_refused(make_recipe, make_batch):
    recipe, batch = make_recipe(BlockCausal, block_size=4), make_batch([[16]])
    for batches, draws in (([batch], 2), ([batch, batch], 1)):
        with pytest.raises(ValueError, match="two batches and two draws"):
            gradient_noise(recipe, batches, draws)
