"""BlockCausal: Efficient-DLM's loss computed once more with loops and a plain network, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning.noise import NELBO, Noise
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.view import Pattern

BLOCK, LENGTH = 4, 11


def published_mask(context: str, context_rank: str) -> torch.Tensor:
    """The mask of [noisy; clean] or of the noisy copy alone, for one document from position 0."""

    def sees(q: int, k: int) -> bool:
        block_q, block_k = q % LENGTH // BLOCK, k % LENGTH // BLOCK
        q_clean, k_clean = q >= LENGTH, k >= LENGTH
        if context == "noisy":
            return block_q >= block_k
        if q_clean and k_clean:
            return k <= q if context_rank == "causal" else block_q >= block_k
        return block_q > block_k if k_clean else not q_clean and block_q == block_k

    size = LENGTH * (2 if context == "clean" else 1)
    return torch.tensor([[sees(q, k) for k in range(size)] for q in range(size)])


@pytest.mark.parametrize("context, context_rank", [("clean", "block"), ("clean", "causal"), ("noisy", "block")])
@pytest.mark.parametrize("shift", ["none", "next_token"])
def test_training_and_validation_by_hand(
    make_recipe, make_batch, plain_logits, validated, context, context_rank, shift
):
    recipe = make_recipe(BlockCausal, block_size=BLOCK, context=context, context_rank=context_rank, shift=shift)
    batch = make_batch([[LENGTH]])
    ids = batch.ids_BL[0]
    mask = published_mask(context, context_rank)
    position = torch.arange(LENGTH).repeat(len(mask) // LENGTH)

    def by_hand(noise: Noise) -> float:
        mask_L, weight_L = (x[0] for x in recipe.draw(noise, batch, Pattern(BLOCK)))
        shown = torch.where(mask_L, 300, ids)
        shown = torch.cat([shown, ids]) if context == "clean" else shown
        logp = plain_logits(recipe.denoiser, shown, position, mask)[:, :300].log_softmax(1)
        total = 0.0
        for i in mask_L.nonzero().flatten().tolist():
            read = i - (shift == "next_token")
            if shift == "next_token" and i % BLOCK == 0 and context == "clean":
                read += LENGTH  # the first token of a block is read from the clean context
            total -= weight_L[i].item() * logp[read, ids[i]].item()
        return total

    assert recipe.noise.masking == "tilted" and recipe.noise.weight == "inverse_t"
    assert recipe.training_step(batch, 0).item() == pytest.approx(by_hand(recipe.noise), rel=1e-5)
    metrics = validated(recipe, batch)
    assert metrics["nelbo"] == pytest.approx(by_hand(NELBO) / (LENGTH - 1), rel=1e-5)
    causal = plain_logits(recipe.denoiser, ids, torch.arange(LENGTH), torch.ones(LENGTH, LENGTH).tril().bool())
    logp = causal[:, :300].log_softmax(1)
    ar_nll = -sum(logp[i - 1, ids[i]].item() for i in range(1, LENGTH)) / (LENGTH - 1)
    assert metrics["ar_nll"] == pytest.approx(ar_nll, rel=1e-5)


def test_an_ar_weight_adds_the_ar_loss(make_recipe, make_batch, validated):
    batch = make_batch([[LENGTH, 4], [9]], length=15)
    for options in ({"context_rank": "causal"}, {"context": "noisy"}):
        plain, with_ar = (make_recipe(BlockCausal, block_size=BLOCK, ar_weight=w, **options) for w in (0.0, 0.3))
        difference = with_ar.training_step(batch, 0).item() - plain.training_step(batch, 0).item()
        assert difference == pytest.approx(
            0.3 * validated(plain, batch)["ar_nll"] * batch.maskable_BL.sum().item(), rel=1e-4
        )


def test_wrong_settings_are_refused():
    for options, message in [
        ({"ar_weight": 0.1}, r"model.ar_weight .* model.context_rank: causal"),
        ({"context": "noisy", "context_rank": "causal"}, "context_rank: causal needs .*context: clean"),
        ({"noise": Noise("complementary", "one")}, "noise.masking: complementary does not go with BlockCausal"),
        ({"block_size": 0}, "block_size must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            BlockCausal(source="anything", **options)


def test_one_of_source_and_config_is_needed():
    for options in ({}, {"source": "anything", "config": {"model_type": "llama"}}):
        with pytest.raises(ValueError, match=r"model\.source .* model\.config"):
            BlockCausal(**options)
