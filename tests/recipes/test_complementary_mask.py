"""ComplementaryMask: 3L tokens say the same as the published two passes over 2L, and every token is scored once."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning.noise import NELBO, Noise
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.recipes.complementary_mask import ComplementaryMask
from dlm_lightning.view import Pattern, groups


@pytest.fixture
def batch(make_batch):
    return make_batch([[9, 7], [13], [5, 5]], length=16, prompts={(1, 0): 40}, starts={(1, 0): 37})


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shift", ["none", "next_token"])
@pytest.mark.parametrize("first_token", ["clean", "noisy"])
def test_a_shared_clean_copy_equals_two_passes_loss_and_gradients(
    batch, make_denoiser, loss_and_gradients, assert_same, make_recipe, family, tied, shift, first_token
):
    denoiser = make_denoiser(family, tied, shift=shift, first_token=first_token)
    recipe = make_recipe(ComplementaryMask, block_size=4)
    pattern = Pattern(4, "clean")
    copies = recipe.corrupt(batch, pattern)
    together = loss_and_gradients(denoiser, batch, copies, pattern)
    (first, gradients), (second, more) = (loss_and_gradients(denoiser, batch, [copy], pattern) for copy in copies)
    assert_same(together, (first + second, {name: g + more[name] for name, g in gradients.items()}))


def test_a_pairs_masks_are_disjoint_and_together_all_maskable_tokens(make_recipe, batch):
    recipe = make_recipe(ComplementaryMask, block_size=4)
    first, second = recipe.corrupt(batch, recipe.pattern)
    assert first.mask_BL.any() and second.mask_BL.any()
    assert torch.equal(first.mask_BL ^ second.mask_BL, batch.maskable_BL)
    assert torch.equal(first.weight_BL + second.weight_BL, batch.maskable_BL.float())
    # the first copy is bernoulli with one t per block
    block_BL = groups(batch.position_BL, batch.document_BL, 4)
    p_BL = (1 - 1e-3) * batch.t_BL.gather(1, block_BL) + 1e-3
    assert torch.equal(first.mask_BL, batch.maskable_BL & (batch.u_BL < p_BL))


@pytest.mark.parametrize("first_token", ["clean", "noisy"])
def test_training_step_by_hand(make_recipe, make_batch, plain_logits, first_token):
    recipe = make_recipe(ComplementaryMask, block_size=4, first_token=first_token)
    assert recipe.shift == "next_token"
    batch = make_batch([[10]])
    ids, total = batch.ids_BL[0], 0.0

    def sees(q: int, k: int) -> bool:
        block_q, block_k = q % 10 // 4, k % 10 // 4
        if k < 10:
            return q < 10 and block_q == block_k
        return block_q > block_k if q < 10 else block_q >= block_k

    mask = torch.tensor([[sees(q, k) for k in range(20)] for q in range(20)])
    for copy in recipe.corrupt(batch, recipe.pattern):  # [noisy; clean] twice, as published
        shown = torch.cat([torch.where(copy.mask_BL[0], 300, ids), ids])
        logp = plain_logits(recipe.denoiser, shown, torch.arange(10).repeat(2), mask)[:, :300].log_softmax(1)
        for i in copy.mask_BL[0].nonzero().flatten().tolist():
            clean = i % 4 == 0 and first_token == "clean"
            total -= logp[i - 1 + 10 * clean, ids[i]].item()
    assert recipe.training_step(batch, 0).item() == pytest.approx(total, rel=1e-5)


def test_validation_is_the_nelbo_of_block_causal(make_recipe, batch, validated):
    mine = make_recipe(ComplementaryMask, block_size=4)
    theirs = make_recipe(BlockCausal, block_size=4, shift="next_token", noise=NELBO)
    metrics = validated(mine, batch)
    assert metrics == pytest.approx(validated(theirs, batch), rel=1e-6)
    loss = theirs.training_step(batch, 0).item() / batch.maskable_BL.sum().item()
    assert metrics["nelbo"] == pytest.approx(loss, rel=1e-5)


def test_an_ar_weight_adds_the_ar_loss_on_the_one_clean_copy(make_recipe, batch, validated):
    plain, with_ar = (
        make_recipe(ComplementaryMask, block_size=4, context_rank="causal", ar_weight=w) for w in (0.0, 0.3)
    )
    difference = with_ar.training_step(batch, 0).item() - plain.training_step(batch, 0).item()
    assert difference == pytest.approx(
        0.3 * validated(plain, batch)["ar_nll"] * batch.maskable_BL.sum().item(), rel=1e-4
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ar_weight": 0.1}, r"model.ar_weight .* model.context_rank: causal"),
        ({"noise": Noise("exact", "count_ratio")}, "noise.masking: exact does not go with ComplementaryMask"),
        ({"noise": Noise("bernoulli", "inverse_p")}, "noise.masking: bernoulli does not go with ComplementaryMask"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ComplementaryMask(source="anything", **options)
