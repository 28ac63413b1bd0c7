"""The plain causal model that a run's source was: nothing of the diffusion model is left but its weights."""

from __future__ import annotations

from dlm_lightning import layouts
from dlm_lightning.module import Recipe


def forget(recipe: Recipe) -> None:
    """Take away what AR tools would misread: rows that were added for the mask token, and what the config says."""
    network = recipe.denoiser.network
    if recipe.source:
        network.resize_token_embeddings(recipe.source.config.vocab_size)
    if hasattr(network.config, layouts.KEY):
        delattr(network.config, layouts.KEY)
