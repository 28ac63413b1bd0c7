"""The yardstick: what it logs are means of the bound over all tokens, the same on any number of batches."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from dlm_lightning.callbacks.yardstick import STREAM, Yardstick
from dlm_lightning.likelihood import Blocks, bound, redrawn
from dlm_lightning.recipes.ar_source import ArSource
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.recipes.full_bidirectional import FullBidirectional
from dlm_lightning.view import Batch

ROWS = [[14], [5, 9], [9, 3], []]


def validated(recipe, batches, *callbacks, precision="32-true") -> dict[str, float]:
    """What a validation with these callbacks logs."""
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.validate(recipe, DataLoader(batches, batch_size=None), verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def rows(batch: Batch, *numbers: int) -> Batch:
    return Batch(*(tensor[list(numbers)] for tensor in batch))


@pytest.fixture
def recipe(source_folder):
    def make(recipe_class, **options):
        return recipe_class(source=str(source_folder()), **options)

    return make


@pytest.mark.filterwarnings("ignore")
def test_it_logs_the_mean_share_of_a_token_however_rows_are_batched(recipe, make_batch):
    """Blocks of 4 hold two of 2: two passes where the rest is masked, one where it is absent."""
    batch, own = make_batch(ROWS, length=16), recipe(BlockCausal, block_size=4)
    yardstick = Yardstick((1, 2, 8), profile_size=2, passes=2)
    found = validated(own, [batch], yardstick)
    draws = [redrawn(batch, 0, STREAM, n)[0] for n in range(2)]
    counts = {
        ("masked", 1): 2,
        ("masked", 2): 2,
        ("masked", 8): 1,
        ("absent", 1): 1,
        ("absent", 2): 1,
        ("absent", 8): 1,
    }
    for (future, size), count in counts.items():
        choice_BL = redrawn(batch, 0, STREAM, 0)[1]
        with torch.no_grad():
            shares = [
                bound(own.denoiser, draws[n], Blocks(size, future), (n + choice_BL) / count).share_BL
                for n in range(count)
            ]
        wanted = torch.stack(shares).sum() / count / batch.maskable_BL.sum()
        assert found[f"bound/{future}/{size}"] == pytest.approx(wanted.item(), rel=1e-5)
    apart = validated(own, [rows(batch, 0), rows(batch, 1, 2), rows(batch, 3)], yardstick)
    assert apart == pytest.approx(found, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_it_measures_in_the_precision_that_is_trained_in(recipe, make_batch):
    batch, own = make_batch(ROWS, length=16), recipe(BlockCausal, block_size=4)
    found = validated(own, [batch], Yardstick((4,), profile_size=4), precision="bf16-mixed")["bound/masked/4"]
    noisy, choice_BL = redrawn(batch, 0, STREAM, 0)

    def wanted() -> float:
        share_BL = bound(own.denoiser, noisy, Blocks(4), choice_BL).share_BL
        return (share_BL.sum() / batch.maskable_BL.sum()).item()

    with torch.no_grad():
        assert found != pytest.approx(wanted(), rel=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert found == pytest.approx(wanted(), rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_as_many_passes_as_a_block_holds_leave_nothing_to_chance_but_the_noise(recipe, make_batch):
    """At block size 1 there is no noise, so it is the chain rule: all turns, added up."""
    batch, own = make_batch(ROWS, length=16), recipe(BlockCausal, block_size=4)
    found = validated(own, [batch], Yardstick((1,), profile_size=1))
    with torch.no_grad():
        chain = sum(bound(own.denoiser, batch, Blocks(1), turn).share_BL.sum() for turn in range(4))
    assert found["bound/masked/1"] == pytest.approx((chain / batch.maskable_BL.sum()).item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_model_without_blocks_is_measured_by_the_documents_blocks_in_turn(recipe, make_batch):
    """Three passes over a document of three blocks choose each of them once."""
    batch, own = make_batch([[12]]), recipe(FullBidirectional)
    found = validated(own, [batch], Yardstick((4,), profile_size=4, passes=3))
    assert {name for name in found if name.startswith("bound")} == {"bound/masked/4"}
    total = 0.0
    for n in range(3):
        noisy, _ = redrawn(batch, 0, STREAM, n)
        with torch.no_grad():
            total += bound(own.denoiser, noisy, Blocks(4), n).share_BL.sum().item()
    assert found["bound/masked/4"] == pytest.approx(total / 11, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_profile_shares_out_the_bound(recipe, make_batch):
    batch, own = make_batch([[16], [16]], length=16), recipe(BlockCausal, block_size=8)
    found = validated(own, [batch], Yardstick((4,), profile_size=4))
    at = [found[f"profile/position/{place}"] for place in range(4)]
    counts = [(batch.maskable_BL & (batch.position_BL % 4 == place)).sum().item() for place in range(4)]
    assert sum(a * n for a, n in zip(at, counts, strict=True)) / sum(counts) == pytest.approx(found["bound/masked/4"])
    levels = [value for name, value in found.items() if name.startswith("profile/level/")]
    assert levels and all(value > 0 for value in levels)


@pytest.mark.filterwarnings("ignore")
def test_an_autoregressive_model_has_its_own_likelihood_alone(recipe, make_batch):
    found = validated(recipe(ArSource), [make_batch(ROWS, length=16)], Yardstick())
    assert {name for name in found if name.startswith("bound/")} == {"bound/masked/1", "bound/absent/1"}
    assert found["bound/masked/1"] == found["bound/absent/1"] == pytest.approx(found["val/ar_nll"])


@pytest.mark.filterwarnings("ignore")
def test_a_size_that_does_not_divide_the_models_blocks_is_left_out_where_they_are_kept(recipe, make_batch):
    found = validated(
        recipe(BlockCausal, block_size=6), [make_batch(ROWS, length=16)], Yardstick((2, 4), profile_size=2)
    )
    assert {name for name in found if name.startswith("bound/")} == {
        "bound/masked/2",
        "bound/absent/2",
        "bound/absent/4",
    }


@pytest.mark.parametrize(
    "options, message", [({"passes": 0}, "passes must be at least 1"), ({"profile_size": 5}, "one of 1")]
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Yardstick(**options)
