"""`dlm export`: a run's newest weights as a folder for other tools."""

from __future__ import annotations

from pathlib import Path

from dlm_lightning import layouts
from dlm_lightning.consolidate import write
from dlm_lightning.module import Recipe


def as_causal(run: str, out: str) -> Path:
    """Write a run's weights as the plain causal model that its source was, and return the folder, which must be new.

    Nothing of the diffusion model is left but its weights: no row that was added for the mask token, whose logit AR
    tools would take for a token's, and no word of how it was trained. Adapters are merged.
    """
    if not out.strip():
        raise ValueError("OUT needs the name of a new folder")
    return write(run, Path(out).expanduser(), "name a new folder", _forget)


def _forget(recipe: Recipe) -> None:
    network = recipe.denoiser.network
    if recipe.source:
        network.resize_token_embeddings(recipe.source.config.vocab_size)
    if hasattr(network.config, layouts.KEY):
        delattr(network.config, layouts.KEY)
