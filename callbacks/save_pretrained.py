"""Saves the finished network as an ordinary Hugging Face folder in the run: config, safetensors, tokenizer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from dlm_lightning import lora
from dlm_lightning.module import Recipe
from dlm_lightning.source import SAVED_MODEL


class SavePretrained(L.Callback):
    """Writes `<run>/model` after the last step; records no metric and holds no state.

    The folder appears whole or not at all, adapters merged, and plain transformers loads it. It is there before the
    last checkpoint is: a run that is finished has its model.
    """

    def on_train_batch_end(self, trainer: L.Trainer, recipe: Recipe, *_: Any) -> None:
        if trainer.global_step < trainer.max_steps:
            return
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole: dict[str, Any] = get_model_state_dict(recipe.denoiser.network, options=options)
        write(recipe, whole, Path(trainer.default_root_dir) / SAVED_MODEL, writes=trainer.is_global_zero)


def write(
    recipe: Recipe,
    weights: dict[str, Any],
    folder: Path,
    writes: bool = True,
    finish: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write a network's whole state dict as a folder, in place of what lies there; all ranks call it, one writes.

    `finish` is given the folder before it gets its name.
    """
    network = recipe.denoiser.network
    once, names = (dict(network.named_parameters(remove_duplicate=flag)) for flag in (True, False))
    tied = names.keys() - once.keys()  # copies by now, where the strategy gathers each name by itself
    kept = {name: weight for name, weight in lora.merged(network, weights).items() if name not in tied}
    if not writes:
        return
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    network.save_pretrained(beside, state_dict=kept, max_shard_size="5GB")
    recipe.tokenizer.save_pretrained(beside)
    finish(beside)
    for path in beside.iterdir():  # safetensors makes files that nobody else can read
        path.chmod((beside / "config.json").stat().st_mode)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(beside, folder)
