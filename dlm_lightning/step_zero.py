"""The step-0 report: is the initial loss normal?"""

from __future__ import annotations

import math
from typing import Any

from dlm_lightning.module import Recipe


def step_zero(recipe: Recipe, data: Any, metrics: dict[str, Any]) -> str:
    """One line that says whether the initial loss is normal, from a validation pass before the first step."""
    guess, unigram = math.log(recipe.model_config.vocab_size), data.unigram_entropy()
    marks = f"a uniform guess is ln V = {guess:.2f}, the corpus's unigram entropy {unigram:.2f}"
    if "val/masked_ce" not in metrics:
        return f"step 0: next-token NLL {metrics['val/ar_nll']:.2f} nats; {marks}"
    loss = float(metrics["val/masked_ce"])
    pretrained = recipe.pretrained and recipe.source is not None
    own = f"the {'source' if pretrained else 'network'}'s own next-token NLL {metrics['val/ar_nll']:.2f}"
    if not pretrained:
        verdict = (
            "normal for random weights: about ln V" if loss < guess + 1 else "high: random weights start near ln V"
        )
    elif metrics["val/ar_nll"] >= unigram:
        verdict = (
            "doubtful: the source itself reads this text no better than word frequencies; are its weights trained, and "
            "is the tokenizer its own?"
        )
    elif loss < unigram:
        verdict = "normal: the source already reads this pattern better than word frequencies"
    elif recipe.source and recipe.source.diffusion:
        verdict = (
            "high: the source is a diffusion model already and should read masks better than word frequencies, unless "
            "this data is far from what it was trained on"
        )
    elif loss < 3 * guess:
        verdict = (
            "normal: the source has never seen the mask token, so it starts between its own NLL and about three times "
            "ln V, and falls below the unigram entropy early in training"
        )
    else:
        verdict = "high: look at model.shift and model.mask_token before training on"
    return f"step 0: masked cross-entropy {loss:.2f} nats, unweighted; {marks}, {own}. {verdict}"
