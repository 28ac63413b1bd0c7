"""`dlm export`: a run's newest weights as a folder for other tools."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from dlm_lightning.consolidate import write
from dlm_lightning.export import block_diffusion, causal


def export(run: str, out: str, form: str) -> Path:
    """Write a run's weights in a form, `hf` or `ar`, to a new folder, and return it."""
    if not out.strip():
        raise ValueError("OUT needs the name of a new folder")
    target, otherwise = Path(out).expanduser(), "name a new folder"
    if form == "ar":
        return write(run, target, otherwise, causal.forget)
    return write(run, target, otherwise, block_diffusion.check, partial(block_diffusion.complete, target.name))
