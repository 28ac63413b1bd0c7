"""ArSource: transformers' own causal loss, in training and as an exact likelihood in validation."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from dlm_lightning.recipes.ar_source import ArSource
from dlm_lightning.view import AUTOREGRESSIVE


def test_training_and_validation_are_the_sources_own_causal_loss(make_recipe, make_batch, source_folder, validated):
    recipe = make_recipe(ArSource)
    batch = make_batch([[7, 5], [10], []], length=13)
    network = AutoModelForCausalLM.from_pretrained(source_folder())
    documents = [batch.ids_BL[0, :7], batch.ids_BL[0, 7:12], batch.ids_BL[1, :10]]
    losses = [network(input_ids=d[None], labels=d[None]).loss * (len(d) - 1) for d in documents]
    total = sum(losses)
    loss = recipe.training_step(batch, 0)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    metrics = validated(recipe, batch)
    assert metrics == pytest.approx({"nelbo": total.item() / 19, "ar_nll": total.item() / 19}, rel=1e-5)
    total.backward()
    loss.backward()
    theirs, mine = network.model.norm.weight.grad, recipe.denoiser.network.model.norm.weight.grad
    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5 * theirs.norm().item())


def test_nothing_is_masked(make_recipe, make_batch):
    recipe = make_recipe(ArSource)
    batch = make_batch([[6]])
    assert recipe.pattern == recipe.train_pattern == AUTOREGRESSIVE
    assert recipe.corrupt(batch, recipe.pattern) == recipe.nelbo_masks(batch) == []
    view = recipe.show(batch, [], recipe.pattern)
    assert torch.equal(view.ids_BS, batch.ids_BL) and view.structure == "causal"


@pytest.mark.parametrize("option", ["shift", "first_token", "noise", "ar_weight"])
def test_what_makes_it_autoregressive_cannot_be_set(option):
    with pytest.raises(TypeError, match=option):
        ArSource(source="anything", **{option: None})
