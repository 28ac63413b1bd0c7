"""Checkpoints of a run: the newest complete one, and its content for any strategy; `saving` makes them.

A checkpoint is a folder, `<run>/checkpoints/step=100`: `state.ckpt`, which is Lightning's checkpoint, one file or under
FSDP2 a folder of shards, and `manifest.json`, which is written last. A name that begins with a dot is unfinished.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from dlm_lightning import manifest

log = logging.getLogger(__name__)
FOLDER, STATE = "checkpoints", "state.ckpt"
FACTS = "dlm_lightning"  # the key under which every recipe states what a continued run must share
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


# Finding


def newest(run: Path, before: int | None = None) -> Path | None:
    """The complete checkpoint of a run with the most steps, of those below `before`; None if it has none at all.

    Says which newer ones it passes over and why; ValueError if it would have to pass over all of them.
    """
    why = ""
    for _, path in by_step(run / FOLDER, None if before is None else before - 1):
        try:
            manifest.verify(path)
        except (ValueError, OSError) as error:
            log.info("passed over: %s", error)
            why = why or str(error)
        else:
            return path
    if why:
        raise ValueError(f"no checkpoint in {run / FOLDER} is complete: {why}")
    return None


def steps(path: Path) -> int:
    """How many optimizer steps a complete checkpoint has made."""
    return manifest.read(path)["step"]


def by_step(folder: Path, at_most: int | None = None) -> list[tuple[int, Path]]:
    """What lies in a run's `checkpoints`, most steps first; by name where the manifest does not tell."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith("."):
            continue
        try:
            step = steps(path)
        except (ValueError, OSError):
            number = re.search(r"\d+", path.name)
            step = int(number[0]) if number else -1
        if at_most is None or step <= at_most:
            found.append((step, path))
    return sorted(found, reverse=True)


# Reading


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


def load(state: Path) -> dict[str, Any]:
    """Lightning's checkpoint, tensors and plain values only, mapped from the file; of shards, all but the tensors.

    Raises ValueError, naming the checkpoint, for one that holds anything else or was not written by a recipe.
    """
    file = state / _SHARDED_META if state.is_dir() else state
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {state.parent}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=not state.is_dir())
        if state.is_dir():
            _check_shards(state)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{state.parent} holds more than tensors and plain values, which could run code; refused"
        ) from error
    except (RuntimeError, OSError, EOFError, KeyError, AttributeError) as error:
        raise ValueError(f"{state.parent} is damaged or not a checkpoint") from error
    if not isinstance(content, dict) or FACTS not in content:
        raise ValueError(f"{state.parent} was not written by dlm_lightning")
    return content


def read(path: Path) -> dict[str, Any]:
    """`load` for a checkpoint's folder that is first compared with its manifest; ValueError if it is incomplete."""
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}, which would be a folder such as checkpoints/step=100")
    manifest.verify(path)
    return load(path / STATE)


def whole(state: Path) -> dict[str, Any]:
    """`load` with all tensors: shards are put together in this process, as one file would hold them."""
    content = load(state)
    if not state.is_dir():
        return content
    tensors: dict[str, Any] = {}
    _load_state_dict(tensors, dcp.FileSystemReader(state), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    optimizers = [tensors[key] for key in sorted(tensors) if key.startswith("optimizer_")]
    return {
        **content,
        "state_dict": tensors["state_dict"],
        "optimizer_states": [_by_number(optimizer) for optimizer in optimizers],
    }


def _by_number(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state by the parameters' places in its groups, as torch's own optimizers have it."""
    number = {name: n for n, name in enumerate(name for group in state["param_groups"] for name in group["params"])}
    return {
        "state": {number[name]: values for name, values in state["state"].items()},
        "param_groups": [{**g, "params": [number[name] for name in g["params"]]} for g in state["param_groups"]],
    }


def by_name(state: dict[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """An optimizer's state by parameters' names, group by group, from one by their places in the groups."""
    flat = [name for group in names for name in group]
    return {
        "state": {flat[number]: values for number, values in state["state"].items()},
        "param_groups": [{**g, "params": own} for g, own in zip(state["param_groups"], names, strict=True)],
    }


def load_weights(recipe: Any, path: Path) -> dict[str, Any]:
    """Load a checkpoint's weights into a recipe whose model is built; returns what else the checkpoint says.

    Raises ValueError, naming the difference, if the weights are to be read otherwise than the recipe says.
    """
    state = path / STATE
    content = load(state)
    agree(content[FACTS], recipe.reading())
    if state.is_dir():
        weights = {"state_dict": recipe.state_dict()}
        dcp.load(weights, checkpoint_id=str(state))
        recipe.load_state_dict(weights["state_dict"])
    else:
        recipe.load_state_dict(content["state_dict"])
    return content


class ElasticIO(CheckpointIO):
    """Writes one file, and reads one file or shards, for strategies in which each process holds the whole network."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with open(path, "wb") as file:  # Lightning's own makes two copies in memory first
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return whole(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        os.remove(path)


def agree(stated: dict[str, Any], wanted: dict[str, Any]) -> None:
    """ValueError, naming it, if a checkpoint states another value of a fact than is wanted, or none."""
    for name, mine in wanted.items():
        if name not in stated:
            raise ValueError(f"the checkpoint does not state {name}, this run has {mine}")
        if stated[name] != mine:
            raise ValueError(f"the checkpoint was made with {name} {stated[name]}, this run has {mine}")


def rewind(content: dict[str, Any], accumulate: int) -> None:
    """Set Lightning's counters to those at the end of the checkpoint's step, for `accumulate` micro-batches a step.

    They then are a function of the step, whoever wrote the checkpoint.
    """
    step = content["global_step"]
    batches = step * accumulate
    loop = content["loops"]["fit_loop"]
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1  # Lightning adds one on a restart
    loop["epoch_loop.batch_progress"]["is_last_batch"] = False  # which the next batch may be, fetched at the save
    for counter in ("total", "current"):
        seen = dict.fromkeys(("ready", "started", "processed"), batches)
        loop["epoch_loop.batch_progress"][counter] |= {**seen, "completed": batches - 1}
