"""What a decoder fills: documents of different lengths, side by side, and how far each has come.

Shapes: B rows, a document each; L tokens of the longest document when it is full.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlm_lightning.view import block_start


class Canvas:
    """Prompts and the masks after them, filled block by block, and within a block part by part.

    ids_BL: the tokens; a mask is what is left to fill in.
    number_B: which prompt a row is.
    prompt_B: its tokens.
    end_B: tokens of the row when it is full.
    start_B, stop_B: the block of the first mask.
    part_B, until_B: the part of it, the block itself without parts.
    forwards_B: forwards spent on this part so far.
    final_B: what lies before was shown when all that it sees was filled in.
    shown_BL: what was shown since its block began.
    clean_BL: what was shown since it was filled in.

    Args:
        prompts: token ids; masks in them are filled in, too.
        new_tokens: masks after each prompt.
        block_size: tokens per block, which lie on a document's positions; None for one block, the document.
        part_size: tokens per part of a block; None for one part, the block.
        mask_id: the id of the mask.
        ahead: whether later blocks are seen, as masks.
        length: columns; by default as many as the longest document has tokens when it is full.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        block_size: int | None,
        part_size: int | None,
        mask_id: int,
        ahead: bool,
        device: torch.device,
        length: int | None = None,
    ) -> None:
        self.block_size, self.part_size, self.mask_id, self.ahead = block_size, part_size, mask_id, ahead
        prompt_B = torch.tensor([len(prompt) for prompt in prompts])
        ids_BL = torch.full((len(prompts), length or int(prompt_B.max()) + new_tokens), mask_id)
        for row, prompt in enumerate(prompts):
            ids_BL[row, : len(prompt)] = torch.tensor(prompt)
        self.ids_BL, self.prompt_B = ids_BL.to(device), prompt_B.to(device)
        self.end_B = self.prompt_B + new_tokens
        self.number_B = torch.arange(len(prompts), device=device)
        self.position_L = torch.arange(ids_BL.shape[1], device=device)
        zero_B, no_BL = torch.zeros_like(self.end_B), torch.zeros_like(self.ids_BL, dtype=torch.bool)
        self.start_B = self.stop_B = self.part_B = self.until_B = self.forwards_B = self.final_B = zero_B
        self.shown_BL = self.clean_BL = no_BL
        self._turn()

    def span(self, first_B: Tensor, last_B: Tensor) -> Tensor:
        """The positions from one up to another, bool [B, L]."""
        return (self.position_L >= first_B[:, None]) & (self.position_L < last_B[:, None])

    @property
    def masked_BL(self) -> Tensor:
        """What is left to fill in."""
        return (self.ids_BL == self.mask_id) & (self.position_L < self.end_B[:, None])

    @property
    def open_BL(self) -> Tensor:
        """What is left to fill in of the part."""
        return self.masked_BL & self.span(self.part_B, self.until_B)

    @property
    def reach_B(self) -> Tensor:
        """The end of what can be seen, that of the block or of the document."""
        return self.end_B if self.ahead else self.stop_B

    def visible(self, row: int) -> list[int]:
        """The tokens of a row as far as the next forward can see."""
        return self.ids_BL[row, : self.reach_B[row]].tolist()

    def show(self, shown_BL: Tensor) -> None:
        """Note what a forward shows."""
        self.final_B = torch.where(self._misses(shown_BL), self.final_B, self.start_B)
        self.shown_BL = self.shown_BL | shown_BL
        self.clean_BL = self.clean_BL | (shown_BL & ~self.masked_BL)
        self.forwards_B = self.forwards_B + 1

    def commit(self, chosen_BL: Tensor, token_BL: Tensor) -> None:
        """Put tokens in place of masks, and go on to the part and the block of the first mask that is left."""
        self.ids_BL = torch.where(chosen_BL, token_BL, self.ids_BL)
        self._turn()

    def select(self, rows_N: Tensor) -> None:
        """Keep these rows, in this order."""
        for name, value in list(vars(self).items()):
            if name.endswith(("_B", "_BL")):
                setattr(self, name, value[rows_N])

    def _misses(self, shown_BL: Tensor) -> Tensor:
        """Rows in which something before the block was neither final nor is shown now."""
        return (self.span(self.final_B, self.start_B) & ~shown_BL).any(1)

    def _turn(self) -> None:
        masked_BL = self.masked_BL
        first_B = torch.where(masked_BL.any(1), masked_BL.long().argmax(1), self.end_B)
        block_B = first_B >= self.stop_B
        part_B = block_B | (first_B >= self.until_B)
        self.shown_BL = self.shown_BL & ~block_B[:, None]
        self.forwards_B = torch.where(part_B, 0, self.forwards_B)
        start_B, stop_B = self._around(first_B, self.block_size, self.end_B)
        self.start_B, self.stop_B = (
            torch.where(block_B, start_B, self.start_B),
            torch.where(block_B, stop_B, self.stop_B),
        )
        start_B, stop_B = self._around(first_B, self.part_size, self.stop_B)
        start_B = torch.maximum(start_B, self.start_B)
        self.part_B, self.until_B = torch.where(part_B, start_B, self.part_B), torch.where(part_B, stop_B, self.until_B)

    @staticmethod
    def _around(first_B: Tensor, size: int | None, end_B: Tensor) -> tuple[Tensor, Tensor]:
        start_B = block_start(first_B, size)
        return start_B, end_B if size is None else torch.minimum(start_B + size, end_B)
