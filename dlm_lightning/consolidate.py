"""`dlm consolidate`: a run's newest checkpoint, sharded or not, as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

from dlm_lightning import runs
from dlm_lightning.callbacks import save_pretrained
from dlm_lightning.module import Recipe
from dlm_lightning.parsing import quiet
from dlm_lightning.reopening import restore
from dlm_lightning.source import SAVED_MODEL


def consolidate(folder: str, out: str | None = None) -> Path:
    """Write `<run>/model`, or another new folder, and return the folder."""
    target = Path(out).expanduser() if out else Path(folder).expanduser() / SAVED_MODEL
    return write(folder, target, "name a new folder by --out DIR")


def write(
    run: str,
    target: Path,
    otherwise: str,
    change: Callable[[Recipe], None] = lambda _: None,
    finish: Callable[[Recipe, Path], None] = lambda *_: None,
) -> Path:
    """Write a run's newest weights to a new folder, on the CPU and in the run's own precision, and return the folder.

    Shards are read tensor by tensor into the one network that is then written, as `change` leaves it; `finish` is given
    what was written before it gets its name. `otherwise` says what to do where the folder is there already.
    """
    quiet()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there already; {otherwise}")
    folder, _ = runs.open_run(run)
    precision = yaml.safe_load((folder / runs.CONFIG).read_text())["trainer"]["precision"]
    _, recipe, _ = restore(run, f"--trainer.precision={precision}")
    change(recipe)
    weights = dict(recipe.denoiser.network.state_dict())
    save_pretrained.write(recipe, weights, target, finish=partial(finish, recipe))
    return target
