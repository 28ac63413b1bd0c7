"""Checkpoints of a run: when they are written, which is the newest complete one, and its weights without a trainer."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from dlm_lightning import interruption

FOLDER = "checkpoints"
_SHARDED_META = "meta.pt"  # Lightning writes it last into a sharded checkpoint's folder
_INDEX = ".metadata"  # torch's own, a pickle that says what lies where in the shards
_INDEX_NAMES = {
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    },
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}
_FACTS = "dlm_lightning"  # the key under which every recipe states what it is


class Checkpoints(ModelCheckpoint):
    """Keeps the newest checkpoints of a run in `<run>/checkpoints`, and always that of the last step.

    After a SIGUSR1 to any rank, at whatever moment, the next optimizer step to finish is the last one for now: all
    ranks save it, make the validation that is due after it, if any, and leave by SystemExit with exit code 75.

    Args:
        every_n_steps: optimizer steps between checkpoints.
        keep: how many to keep.
    """

    def __init__(self, every_n_steps: int = 100, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 1:
            raise ValueError("Checkpoints: every_n_steps and keep must be at least 1")
        super().__init__(
            filename="{step}", monitor="step", mode="max", save_top_k=keep, every_n_train_steps=every_n_steps
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir) / FOLDER)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._step, self._leaving = trainer.global_step, False

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        super().on_train_batch_end(trainer, *rest)
        if trainer.global_step == self._step or trainer.global_step >= trainer.max_steps:
            return  # a micro-batch without a step, or nothing left to make room for
        self._step = trainer.global_step
        self._leaving = trainer.strategy.reduce_boolean_decision(interruption.asked(), all=False)
        if self._leaving:
            self._save_step(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Leave only here: Lightning logs and validates a step after `on_train_batch_end`, a resume does neither."""
        if self._leaving:
            raise SystemExit(interruption.EXIT_CODE)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save_step(trainer)

    def _save_step(self, trainer: L.Trainer) -> None:
        if trainer.global_step > self._last_global_step_saved:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


class _IndexUnpickler(pickle.Unpickler):
    """Makes what an index consists of, and nothing else: torch itself would run whatever the pickle says."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _check_shards(folder: Path) -> None:
    """Raise if a shard is missing or cut off, or if anything in it is more than a tensor or a plain value."""
    with (folder / _INDEX).open("rb") as file:
        index = _IndexUnpickler(file).load()
    for key, place in index.storage_data.items():
        shard = folder / place.relative_path
        if shard.stat().st_size < place.offset + place.length:
            raise EOFError(f"{shard} is cut off")
        if isinstance(index.state_dict_metadata[key.fqn], BytesStorageMetadata):  # torch loads these without a check
            with shard.open("rb") as file:
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), weights_only=True)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content, tensors and plain values only; of a sharded one, all but its tensors.

    Raises ValueError for one that holds anything else, is damaged, or was not written by a recipe.
    """
    file = path / _SHARDED_META if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=not path.is_dir())
        if path.is_dir():
            _check_shards(path)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values, which could run code; refused") from error
    except (RuntimeError, OSError, EOFError, KeyError, AttributeError) as error:  # OSError: cut off near its end
        raise ValueError(f"{path} is damaged or not a checkpoint") from error
    if not isinstance(content, dict) or _FACTS not in content:
        raise ValueError(f"{path} was not written by dlm_lightning")
    return content


def newest(run: Path) -> Path | None:
    """The complete checkpoint of a run with the most steps, or None; damaged ones are passed over."""
    found = []
    for path in (run / FOLDER).glob("*.ckpt"):
        try:
            found.append((read(path)["global_step"], path))
        except (FileNotFoundError, ValueError):
            continue
    return max(found)[1] if found else None


def load_weights(recipe: L.LightningModule, path: Path) -> dict[str, Any]:
    """Load a checkpoint's weights into a recipe whose model is built; returns what else the checkpoint says."""
    content = read(path)
    if path.is_dir():
        state = {"state_dict": recipe.state_dict()}
        dcp.load(state, checkpoint_id=str(path))
        recipe.load_state_dict(state["state_dict"])
    else:
        recipe.load_state_dict(content["state_dict"])
    return content
