"""Prompts with answers: documents that are not split, of which the answers are scored and the last block is filled."""

from __future__ import annotations

from typing import Any, Literal

from dlm_lightning.data.rows import Document
from dlm_lightning.data.token_data import TokenData


class Answers(TokenData):
    """What modules of prompts with answers share: how a document ends.

    Args:
        tail: what fills a document's last block: `eos`, end-of-text tokens that are scored, which teach a model to
            end inside a block; `mask`, mask tokens that are seen and not scored (Fast-dLLM v2); `none`, nothing. In any
            case one end-of-text token follows an answer that does not end with it.
        multiple: fill a document up to a multiple of this many tokens; null takes the model's block size, and fills
            nothing for a model without blocks.
        **options: see `TokenData`.
    """

    splits_documents = False

    def __init__(
        self, tail: Literal["eos", "mask", "none"] = "eos", multiple: int | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        if multiple is not None and multiple < 1:
            raise ValueError(f"data.multiple must be at least 1 or null, not {multiple}")
        self.tail, self.multiple = tail, multiple

    @property
    def ending(self) -> str:
        """What fills the last block."""
        return f"{self.tail} {self._block} {self._fill_id}"

    def facts(self) -> dict[str, int | str]:
        """What must stay as it is when a run is continued."""
        return {"data.tail": self.tail, **super().facts()}

    def close(self, ids: list[int], maskable: list[bool]) -> Document:
        """An end-of-text token unless there is one, and what fills the last block, as far as row and positions go."""
        if self.tail == "mask" and self._fill_id in ids:
            raise ValueError(f"model.mask_token: id {self._fill_id} occurs in the data; choose another")
        if ids[-1:] != [self.tokenizer.eos_token_id]:
            ids, maskable = [*ids, self.tokenizer.eos_token_id], [*maskable, True]
        missing = max(0, min(-len(ids) % self._block, min(self.row_length, self.positions) - len(ids)))
        return Document([*ids, *[self._fill_id] * missing], [*maskable, *[self.tail == "eos"] * missing])

    @property
    def _block(self) -> int:
        """What a filled document's length is a multiple of; 1 fills nothing."""
        block_size = self.trainer.lightning_module.pattern.block_size or 1
        if self.multiple and self.multiple % block_size:
            raise ValueError(f"data.multiple must be a multiple of model.block_size, {block_size}, not {self.multiple}")
        return 1 if self.tail == "none" else self.multiple or block_size

    @property
    def _fill_id(self) -> int:
        return self.trainer.lightning_module.mask_id if self.tail == "mask" else self.tokenizer.eos_token_id

    def _count_tokens(self) -> Any:
        """The tokens of the texts and their ends: mask tokens that fill blocks are none of them."""
        counts = super()._count_tokens()
        if self.tail == "mask":
            counts[self._fill_id : self._fill_id + 1] = 0
        return counts
