"""`dlm consolidate`: a run's newest checkpoint, sharded or not, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import yaml

from dlm_lightning import runs
from dlm_lightning.callbacks import save_pretrained
from dlm_lightning.source import SAVED_MODEL
from dlm_lightning.training import quiet, restore


def consolidate(folder: str, out: str | None = None) -> Path:
    """Write `<run>/model`, or another new folder, on the CPU and in the run's own precision; returns the folder.

    Shards are read tensor by tensor into the one network that is then written.
    """
    quiet()
    target = Path(out).expanduser() if out else Path(folder).expanduser() / SAVED_MODEL
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there already; name a new folder by --out DIR")
    run, _ = runs.open_run(folder)
    precision = yaml.safe_load((run / runs.CONFIG).read_text())["trainer"]["precision"]
    _, recipe, _ = restore(folder, f"--trainer.precision={precision}")
    network = recipe.denoiser.network
    save_pretrained.write(recipe, dict(network.state_dict()), target)
    return target
