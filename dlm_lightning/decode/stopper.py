"""When a row ends: at its length, at the first end-of-text token, at a string.

Shapes: B rows, L tokens of a row, N masks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm_lightning.decode.canvas import Canvas


@dataclass(frozen=True)
class Stopper:
    """Ends a row as soon as every token up to its end is filled in; no forward is spent on what comes after it.

    Args:
        new_tokens: the most tokens after the prompt.
        eos: end at the first end-of-text token after the prompt, which is kept.
        eos_after: the share of the new tokens that is filled in before an end-of-text token may be, in [0, 1].
        strings: end as soon as the new text holds one of these.
    """

    new_tokens: int = 128
    eos: bool = True
    eos_after: float = 0.0
    strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.new_tokens < 0:
            raise ValueError(f"new_tokens must be at least 0, not {self.new_tokens}")
        if not 0 <= self.eos_after <= 1:
            raise ValueError(f"eos_after must lie in [0, 1], not {self.eos_after}")
        if isinstance(self.strings, str):
            raise ValueError(f"stop strings are a list of them, not {self.strings}")
        if not all(self.strings):
            raise ValueError("stop strings must not be empty")

    def forbid(self, logits_NV: Tensor, index_N: Tensor, canvas: Canvas, eos_ids: list[int]) -> None:
        """Take end-of-text tokens from rows that are not filled in far enough, in place."""
        if self.eos_after and eos_ids:
            new_B = canvas.end_B - canvas.prompt_B
            early_B = new_B - canvas.masked_BL.sum(1) < self.eos_after * new_B
            early_N = early_B[index_N // canvas.ids_BL.shape[1]]
            logits_NV[:, eos_ids] = logits_NV[:, eos_ids].masked_fill(early_N[:, None], -torch.inf)

    def ends(self, canvas: Canvas, eos_ids: list[int], text: Callable[[list[int]], str] | None) -> list[int | None]:
        """Of each row how many tokens it ends with, or None while it goes on."""
        masked_BL = canvas.masked_BL
        first_B = torch.where(masked_BL.any(1), masked_BL.long().argmax(1), canvas.end_B)
        ends_B = torch.where(first_B < canvas.end_B, -1, canvas.end_B)
        if self.eos and eos_ids:
            found_BL = torch.isin(canvas.ids_BL, torch.tensor(eos_ids, device=first_B.device))
            found_BL &= canvas.span(canvas.prompt_B, first_B)
            ends_B = torch.where(found_BL.any(1), found_BL.long().argmax(1) + 1, ends_B)
        ends: list[int | None] = [end if end >= 0 else None for end in ends_B.tolist()]
        if self.strings and text:
            for row, (prompt, first) in enumerate(zip(canvas.prompt_B.tolist(), first_B.tolist(), strict=True)):
                new_ids = canvas.ids_BL[row, prompt : ends[row] or first].tolist()
                if self._holds(text(new_ids)):
                    fits = (n for n in range(1, len(new_ids) + 1) if self._holds(text(new_ids[:n])))
                    ends[row] = prompt + next(fits)
        return ends

    def cut(self, text: str) -> str:
        """A text up to the first stop string in it."""
        return (
            text[: min(text.find(string) for string in self.strings if string in text)] if self._holds(text) else text
        )

    def _holds(self, text: str) -> bool:
        return any(string in text for string in self.strings)
