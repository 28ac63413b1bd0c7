"""`dlm export`: a run's newest weights as a folder for other tools."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from dlm_lightning.consolidate import write
from dlm_lightning.export import block_diffusion, causal, published
from dlm_lightning.export.serving import verdict
from dlm_lightning.module import Recipe


def export(run: str, out: str, form: str) -> Path:
    """Write a run's weights in a form, `hf`, `ar` or that of a published layout, to a new folder, and return it.

    Says on stderr who can serve a diffusion model.
    """
    if not out.strip():
        raise ValueError("OUT needs the name of a new folder")
    target, otherwise = Path(out).expanduser(), "name a new folder"
    if form == "ar":
        return write(run, target, otherwise, causal.forget)
    if form == "hf":
        change, complete = block_diffusion.check, block_diffusion.complete
    else:
        change, complete = partial(published.prepare, form=form), partial(published.complete, form)

    def finish(recipe: Recipe, folder: Path) -> None:
        complete(target.name, recipe, folder)
        print(verdict(recipe), file=sys.stderr)

    return write(run, target, otherwise, change, finish)
