"""What `trainer.precision` means here: the network is built in it, and nothing else is rounded."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision

DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}  # of the parameters


ALIASES = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed"}  # Lightning's own


def full_name(precision: Any) -> str:
    """One of `DTYPES` for what `trainer.precision` may say; ValueError for what it may not."""
    name = ALIASES.get(str(precision), str(precision))
    if name not in DTYPES:
        raise ValueError(f"trainer.precision must be one of {', '.join(DTYPES)}, not {precision}")
    return name


class BuiltInBfloat16(Precision):
    """bf16-true for a network that is built so.

    Lightning's own would round the batch's noise and the rotary frequencies, and make bfloat16 the default of all that
    a step creates, such as its counts of tokens.
    """

    precision: Any = "bf16-true"


def settle(strategy: Any) -> torch.dtype:
    """The dtype of the network's parameters under a strategy (None: no trainer); ValueError for another precision."""
    precision = full_name(strategy.precision_plugin.precision if strategy else None)
    if precision == "bf16-true":
        strategy.precision_plugin = BuiltInBfloat16()
    return DTYPES[precision]
