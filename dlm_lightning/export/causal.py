"""The plain causal model that a run's source was: nothing of the diffusion model is left but its weights."""

from __future__ import annotations

from dlm_lightning import layouts
from dlm_lightning.module import Recipe


def forget(recipe: Recipe) -> None:
    """Take away what AR tools would misread: rows that were added for the mask token, and what the config says."""
    network, tokens = recipe.denoiser.network, recipe.tokenizer.get_vocab().values()
    rows = recipe.source.config.vocab_size if recipe.source else network.config.vocab_size
    if recipe.mask_id == rows - 1 and recipe.mask_id not in tokens:  # of a source that was trained here
        rows -= 1
    network.resize_token_embeddings(rows)
    if hasattr(network.config, layouts.KEY):
        delattr(network.config, layouts.KEY)
