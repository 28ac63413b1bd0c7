"""The step-0 line: what it says of each initial loss, and the numbers that it sets beside it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dlm_lightning.step_zero import step_zero

ROWS = 1000
GUESS = math.log(ROWS)  # 6.91
UNIGRAM = 5.25


def line(
    masked_ce: float | None,
    ar_nll: float = 3.21,
    pretrained: bool = True,
    diffusion: object = None,
    sourceless: bool = False,
) -> str:
    source = None if sourceless else SimpleNamespace(diffusion=diffusion)
    recipe = SimpleNamespace(model_config=SimpleNamespace(vocab_size=ROWS), pretrained=pretrained, source=source)
    metrics = {"val/ar_nll": torch.tensor(ar_nll), "val/nelbo": torch.tensor(99.0)}
    if masked_ce is not None:
        metrics["val/masked_ce"] = torch.tensor(masked_ce)
    return step_zero(recipe, SimpleNamespace(unigram_entropy=lambda: UNIGRAM), metrics)


def verdict(*args, **options) -> str:
    said = line(*args, **options)
    assert "\n" not in said
    return said.split(". ", 1)[1]


def test_the_line_sets_the_loss_beside_its_marks():
    assert line(7.891).startswith(
        "step 0: masked cross-entropy 7.89 nats, unweighted; a uniform guess is ln V = 6.91, the corpus's unigram "
        "entropy 5.25, the source's own next-token NLL 3.21. "
    )


@pytest.mark.parametrize("loss", [0.5, UNIGRAM - 0.01])
def test_below_the_unigram_entropy_the_source_reads_the_pattern_already(loss):
    assert verdict(loss).startswith("normal: the source already reads this pattern")


@pytest.mark.parametrize("loss", [UNIGRAM + 0.01, GUESS, 2 * GUESS, 3 * GUESS - 0.01])
def test_up_to_three_times_a_uniform_guess_is_normal_for_a_source_without_a_mask_token(loss):
    assert verdict(loss).startswith("normal: the source has never seen the mask token")


@pytest.mark.parametrize("loss", [3 * GUESS + 0.01, 100.0, math.inf, math.nan])
def test_beyond_it_is_high_and_says_where_to_look(loss):
    assert verdict(loss).startswith("high: look at model.shift and model.mask_token")


@pytest.mark.parametrize("loss, word", [(UNIGRAM - 0.01, "normal"), (UNIGRAM + 0.01, "high"), (100.0, "high")])
def test_a_source_that_is_a_diffusion_model_has_seen_the_mask_token(loss, word):
    assert verdict(loss, diffusion="stated").startswith(f"{word}: the source")
    assert "never seen" not in verdict(loss, diffusion="stated")


@pytest.mark.parametrize("ar_nll", [UNIGRAM, GUESS, math.inf])
def test_a_source_that_does_not_read_the_text_is_doubtful_whatever_the_loss(ar_nll):
    for loss in (0.5, GUESS, 100.0):
        assert verdict(loss, ar_nll=ar_nll).startswith("doubtful: the source itself reads this text no better")


@pytest.mark.parametrize("loss, word", [(GUESS, "normal"), (GUESS + 0.99, "normal"), (GUESS + 1.01, "high")])
def test_random_weights_start_near_a_uniform_guess(loss, word):
    assert verdict(loss, pretrained=False).startswith(f"{word}") and "random weights" in verdict(loss, pretrained=False)


def test_random_weights_have_no_source_to_speak_of():
    assert "the network's own next-token NLL 3.21" in line(GUESS, pretrained=False)
    for options in ({"pretrained": False}, {"sourceless": True}):
        assert "source" not in line(GUESS, **options)
        assert verdict(GUESS, **options).startswith("normal for random weights")


def test_an_autoregressive_model_has_no_masked_loss_to_judge():
    said = line(None, ar_nll=6.5)
    assert said == (
        "step 0: next-token NLL 6.50 nats; a uniform guess is ln V = 6.91, the corpus's unigram entropy 5.25"
    )
