"""`dlm export`: a run's newest weights as a folder for other tools."""

from __future__ import annotations

from pathlib import Path

import yaml

from dlm_lightning import layouts, runs
from dlm_lightning.callbacks import save_pretrained
from dlm_lightning.training import quiet, restore


def as_causal(run: str, out: str) -> Path:
    """Write a run's weights as the plain causal model that its source was, and return the folder, which must be new.

    Nothing of the diffusion model is left but its weights: no row that was added for the mask token, whose logit AR
    tools would take for a token's, and no word of how it was trained. On the CPU, in the run's own precision, adapters
    merged.
    """
    quiet()
    target = Path(out).expanduser()
    if not out.strip():
        raise ValueError("OUT needs the name of a new folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{out} is there already; name a new folder")
    folder, _ = runs.open_run(run)
    precision = yaml.safe_load((folder / runs.CONFIG).read_text())["trainer"]["precision"]
    _, recipe, _ = restore(run, f"--trainer.precision={precision}")
    network = recipe.denoiser.network
    if recipe.source:
        network.resize_token_embeddings(recipe.source.config.vocab_size)
    if hasattr(network.config, layouts.KEY):
        delattr(network.config, layouts.KEY)
    save_pretrained.write(recipe, dict(network.state_dict()), target)
    return target
