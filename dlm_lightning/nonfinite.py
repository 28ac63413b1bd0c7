"""Steps whose loss or gradient is not finite: left out on the device, then noted with their samples, or the run's end.

The optimizer leaves a step out by itself, so that nobody waits for the numbers; they are looked at one step later.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dlm_lightning.conversion import Conversion
from dlm_lightning.transfer import Fetched

log = logging.getLogger(__name__)
Answer = Literal["stop", "skip"]


def leave_out(optimizer: torch.optim.Optimizer, numbers: Tensor) -> None:
    """Have the optimizer's next step change nothing if one of the numbers is not finite, without a look at them.

    Raises TypeError for an optimizer that knows no such thing: torch's own do if they are fused.
    """
    if not all(group.get("fused") for group in optimizer.param_groups):
        raise TypeError(f"{type(optimizer).__name__} cannot leave out a step that is not finite; it needs fused=True")
    optimizer.found_inf = (~numbers.isfinite().all()).float()  # type: ignore[attr-defined]


class Numbers:
    """What a step gave, on its way to the host: some numbers by name, and the norm of each parameter's gradient.

    They are the same on all ranks.

    Args:
        step: its number, from 1.
        named: scalars. norms: a scalar for each parameter, by its name in the network.
    """

    def __init__(self, step: int, named: dict[str, Tensor], norms: dict[str, Tensor]) -> None:
        self.step = step
        self._names, self._parameters = list(named), list(norms)
        self._fetched = Fetched(torch.stack([*named.values(), *norms.values()]))

    def read(self) -> tuple[dict[str, float], list[str]]:
        """The numbers, and the names of the parameters whose gradient is not finite."""
        values = self._fetched.read()
        wrong = (~values[len(self._names) :].isfinite()).tolist()
        broken = [name for name, is_wrong in zip(self._parameters, wrong, strict=True) if is_wrong]
        return dict(zip(self._names, values.tolist(), strict=False)), broken


def look(recipe: Conversion, given: Numbers, answer: Answer) -> dict[str, float]:
    """Look at the numbers of a step that has been left out if one of them is not finite; returns them.

    Then rank 0 writes `<run>/nonfinite/step_<number>.json`, and the run goes on, or rank 0 raises FloatingPointError
    and the others SystemExit(1). All ranks call it together.
    """
    numbers, broken = given.read()
    wrong = [name for name, number in numbers.items() if not math.isfinite(number)]
    if not wrong:
        return numbers
    trainer: Any = recipe.trainer
    note = file(Path(trainer.default_root_dir), given.step)
    said = f"step {given.step} gave numbers that are not finite ({', '.join(wrong)})"
    if trainer.is_global_zero:
        samples = [sample._asdict() for sample in trainer.datamodule.samples_of(given.step)]
        content = {"step": given.step, "numbers": wrong, "parameters": broken, "samples": samples}
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
    return numbers


def file(run: Path, step: int) -> Path:
    """Where the step of this number, from 1, is noted."""
    return run / "nonfinite" / f"step_{step:06d}.json"
