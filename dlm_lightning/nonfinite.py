"""Steps whose loss or gradient is not finite: noted with their samples, and left out or the end of the run."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Literal

import torch

from dlm_lightning import shards
from dlm_lightning.conversion import Conversion

log = logging.getLogger(__name__)
Answer = Literal["stop", "skip"]


def check(recipe: Conversion, numbers: dict[str, float], answer: Answer) -> None:
    """Look at a step's numbers, which are the same on all ranks, before the optimizer uses its gradients.

    Where one is not finite, rank 0 writes `<run>/nonfinite/step_<number>.json`; then the gradients are dropped, so that
    the optimizer changes nothing, or rank 0 raises FloatingPointError and the others SystemExit(1).
    """
    wrong = [name for name, number in numbers.items() if not math.isfinite(number)]
    if not wrong:
        return
    trainer = recipe.trainer
    step = trainer.global_step + 1
    note = file(Path(trainer.default_root_dir), step)
    said = f"step {step} gave numbers that are not finite ({', '.join(wrong)})"
    parameters = broken_gradients(recipe)
    if trainer.is_global_zero:
        samples = [sample._asdict() for sample in trainer.datamodule.samples_of(step)]
        content = {"step": step, "numbers": wrong, "parameters": parameters, "samples": samples}
        note.parent.mkdir(exist_ok=True)
        note.write_text(json.dumps(content, indent=1) + "\n")
        if answer == "skip":
            log.warning("%s and changes nothing; its samples are in %s", said, note)
    trainer.strategy.barrier()  # no rank leaves before the file is there
    if answer == "stop" and not trainer.is_global_zero:
        raise SystemExit(1)
    if answer == "stop":
        raise FloatingPointError(
            f"{said} and was not made; its samples are in {note}; "
            "with model.nonfinite: skip, such a step changes nothing"
        )
    recipe.zero_grad()


def file(run: Path, step: int) -> Path:
    """Where the step of this number, from 1, is noted."""
    return run / "nonfinite" / f"step_{step:06d}.json"


def broken_gradients(recipe: Conversion) -> list[str]:
    """The names of the network's parameters whose gradient is not finite; all ranks call it together."""
    gradients = {name: p.grad for name, p in recipe.denoiser.network.named_parameters() if p.grad is not None}
    here = torch.stack([~shards.local(gradient)[0].isfinite().all() for gradient in gradients.values()])
    anywhere = recipe.trainer.strategy.reduce(here.float(), reduce_op="sum").tolist()
    return [name for name, broken in zip(gradients, anywhere, strict=True) if broken]
