"""A run folder opened again: its trainer, model and data, and its network with the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningCLI

from dlm_lightning import catalog, checkpoint, runs
from dlm_lightning.module import Recipe
from dlm_lightning.parsing import WITHOUT_DEVICES, parse
from dlm_lightning.source import SAVED_MODEL, Source


def weights(folder: str, purpose: str) -> str | None:
    """The state of a run's newest checkpoint; None for an imported model, whose weights are its source's.

    FileNotFoundError for a run that has none yet.
    """
    run, _ = runs.open_run(folder)
    start = checkpoint.newest(run)
    if start is None and not runs.is_imported(folder):
        raise FileNotFoundError(f"{folder} has no complete checkpoint {purpose}")
    return str(start / checkpoint.STATE) if start else None


def restore(folder: str, *overrides: str, path: Path | None = None) -> tuple[Path, Recipe, int]:
    """A run folder, its network on the CPU with the weights of a checkpoint, and its step.

    The checkpoint is at `path`, or the newest complete one; an imported model has none, and its source's weights.
    """
    run, cli = reopen(folder, *WITHOUT_DEVICES, *overrides)
    recipe: Recipe = cli.model
    state = path / checkpoint.STATE if path else weights(folder, "to take weights from")
    if recipe.source is None:
        recipe.tokenizer = _tokenizer(run, cli.datamodule)
    recipe.trainer = cli.trainer  # whose precision the network is built in
    recipe.configure_model()
    return run, recipe, checkpoint.load_weights(recipe, Path(state).parent)["global_step"] if state else 0


def _tokenizer(run: Path, data: Any) -> Any:
    """That of the finished model, or else of the data, for a model that is trained from scratch."""
    if (run / SAVED_MODEL).is_dir():
        return Source(str(run / SAVED_MODEL), weights=False).tokenizer()
    return data.trained_tokenizer()


def reopen(folder: str, *overrides: str, into: str | None = None) -> tuple[Path, LightningCLI]:
    """A run folder's trainer, model and data as its config describes them, wherever the folder lies now.

    What the trainer writes goes there, or `into` another folder.
    """
    run, origin = runs.open_run(folder)
    catalog.make_importable(
        catalog.RecipeFile(origin["recipe"], Path(origin["path"]), origin["origin"], origin["module"])
    )
    config = yaml.safe_load((run / runs.CONFIG).read_text())
    config = _moved(config, config["trainer"].pop("default_root_dir"), str(run))
    return run, parse(config, overrides, into or run)


def _moved(value: Any, then: str, now: str) -> Any:
    """A config in which what lay in the folder `then` lies in `now`."""
    if isinstance(value, dict):
        return {key: _moved(item, then, now) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, then, now) for item in value]
    inside = isinstance(value, str) and (value == then or value.startswith(f"{then}/"))
    return now + value[len(then) :] if inside else value
