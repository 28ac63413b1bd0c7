"""An export in the layout of a published model, which engines and other code know by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlm_lightning.export import block_diffusion, serving
from dlm_lightning.layouts import LAYOUTS
from dlm_lightning.module import Recipe


def prepare(recipe: Recipe, form: str) -> None:
    """Refuse a model that does not fit; see to it that no row that is no token's is ever the likeliest.

    The code of others bans no rows, and training did not lower them. In the head they become the mean of all tokens'
    rows, whose logit is the mean of their logits and so never the highest one. A head that is tied to the embedding,
    which needs the mask's own row, is untied.
    """
    block_diffusion.check(recipe)
    if why := serving.misfits(recipe, form):
        raise ValueError(f"--as {form} does not fit this model: {'; '.join(why)}")
    denoiser, network = recipe.denoiser, recipe.denoiser.network
    head: Any = network.get_output_embeddings()
    with torch.no_grad():
        weight_VD = head.weight.detach().clone()
        mean_D = weight_VD[denoiser.token_ids].float().mean(0)
        weight_VD[denoiser.banned_X] = mean_D.to(weight_VD.dtype)
    head.weight = nn.Parameter(weight_VD)
    network.config.tie_word_embeddings = False


def complete(form: str, name: str, recipe: Recipe, folder: Path) -> None:
    """Write the layout's config, under which plain transformers loads the folder too."""
    layout, config = LAYOUTS[serving.FORMS[form]], recipe.denoiser.network.config
    rope = dict(config.rope_parameters)
    keys: dict[Any, Any] = {
        layout.block_size_key: recipe.pattern.block_size,
        "mask_token_id": recipe.mask_id,
        "rope_theta": rope["rope_theta"],  # some read this key, others rope_parameters
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
    }
    block_diffusion.complete(name, recipe, folder, serving.FORMS[form], layout.architecture, keys)
