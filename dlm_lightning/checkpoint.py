"""Checkpoints of a run: which is the newest complete one, and its weights without a trainer."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule

FOLDER = "checkpoints"
_SHARDED_META = "meta.pt"  # Lightning writes it last into a sharded checkpoint's folder


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content, tensors and plain values only; of a sharded one, all but its tensors.

    Raises ValueError for one that holds anything else, or is damaged.
    """
    file = path / _SHARDED_META if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=not path.is_dir())
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values, which could run code; refused") from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is damaged or not a checkpoint") from error


def newest(run: Path) -> Path | None:
    """The complete checkpoint of a run with the most steps, or None; damaged ones are passed over."""
    found = []
    for path in (run / FOLDER).glob("*.ckpt"):
        try:
            found.append((read(path)["global_step"], path.stat().st_mtime, path))
        except (FileNotFoundError, ValueError):
            continue
    return max(found)[2] if found else None


def load_weights(recipe: LightningModule, path: Path) -> dict[str, Any]:
    """Load a checkpoint's weights into a recipe whose model is built; returns what else the checkpoint says."""
    content = read(path)
    if path.is_dir():
        state = {"state_dict": recipe.state_dict()}
        dcp.load(state, checkpoint_id=str(path))
    recipe.load_state_dict(state["state_dict"] if path.is_dir() else content["state_dict"])
    return content
