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
        **options: see `TokenData`.
    """

    splits_documents = False

    def __init__(self, tail: Literal["eos", "mask", "none"] = "eos", **options: Any) -> None:
        super().__init__(**options)
        self.tail = tail

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
        """What a filled document's length is a multiple of: the finished model's block size, or 1."""
        return 1 if self.tail == "none" else self.trainer.lightning_module.pattern.block_size or 1

    @property
    def _fill_id(self) -> int:
        return self.trainer.lightning_module.mask_id if self.tail == "mask" else self.tokenizer.eos_token_id

    def _count_tokens(self) -> Any:
        """The tokens of the texts and their ends: mask tokens that fill blocks are none of them."""
        counts = super()._count_tokens()
        if self.tail == "mask":
            counts[self._fill_id : self._fill_id + 1] = 0
        return counts
