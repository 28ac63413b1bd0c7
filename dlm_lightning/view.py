"""What the model is shown: tokens, the coordinates that decide who sees whom, and the patterns that lay them out.

Shapes: B rows, L tokens of a row as the data gives it, S tokens of a row as the model sees it (L per copy).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dlm_lightning.transfer import send

Structure = Literal["full", "causal"] | int
STRUCTURES: dict[int | None, Structure] = {None: "full", 1: "causal"}  # of one copy, by its block size


class Batch(NamedTuple):
    """Rows of packed documents and the raw uniforms that will become their noise.

    ids_BL, position_BL, document_BL: int64. `position` counts from the document's own start, also when it spans rows;
    `document` numbers the documents of a row from 0, and each padding token is a negative document of its own.
    maskable_BL: bool, false for padding, prompts, and the first token of each document in the row.
    u_BL: float32 in [0, 1), one per token.
    t_BL: float32 in (0, 1], one per slot; a block or a document reads the slot of its first token.
    place_B: the sample's place in its epoch's order, -1 for a row of padding.
    """

    ids_BL: Tensor
    position_BL: Tensor
    document_BL: Tensor
    maskable_BL: Tensor
    u_BL: Tensor
    t_BL: Tensor
    place_B: Tensor


@dataclass(frozen=True)
class View:
    """Token ids and five integer coordinates per token, all int64 of one shape [B, S].

    position: place in the document; drives RoPE, shared by all copies of a token.
    rank: visibility rank, the position at which the token's group (block) starts.
    order: order inside a group; equal orders see each other.
    copy: 0 is the context that later ranks may read; 1, 2, … are noisy copies, read by nobody else.
    document: packed documents never see each other; a padding token is a negative document of its own.
    structure: what is known of the whole view without looking at it: each document is one run, attended in `full` or
    in `causal` order; or, with a cache, the tokens of a row come in groups of so many, each of which sees all slots of
    its row up to its own last position.
    starts: of a view that came from the host (see `to`), where the documents of the flattened rows start, and their
    end: int32.
    """

    ids_BS: Tensor
    position_BS: Tensor
    rank_BS: Tensor
    order_BS: Tensor
    copy_BS: Tensor
    document_BS: Tensor
    structure: Structure | None = None
    starts: Tensor | None = None

    @property
    def coordinates(self) -> tuple[Tensor, ...]:
        """The six tensors, token ids first."""
        return tuple(getattr(self, field.name) for field in fields(self)[:6])

    def __getitem__(self, index: tuple) -> View:
        """The same index applied to all tensors, as in `view[:, :, None]`."""
        ids, position, rank, order, copy, document = (tensor[index] for tensor in self.coordinates)
        return View(ids, position, rank, order, copy, document)

    def to(self, device: torch.device) -> View:
        """The same view on a device; documents that are each one run are looked for before, on the host."""
        starts = document_starts(self.document_BS) if self.structure in ("full", "causal") else None
        ids, position, rank, order, copy, document = (send(tensor, device) for tensor in self.coordinates)
        there = None if starts is None else send(starts, device)
        return View(ids, position, rank, order, copy, document, self.structure, there)

    @staticmethod
    def beside(views: Sequence[View]) -> View:
        """Views laid side by side along S; a single view is returned as it is."""
        if len(views) == 1:
            return views[0]
        columns = (torch.cat(tensors, dim=1) for tensors in zip(*(v.coordinates for v in views), strict=True))
        ids, position, rank, order, copy, document = columns
        return View(ids, position, rank, order, copy, document)


def document_starts(document_BS: Tensor) -> Tensor:
    """Where the documents of the flattened rows start, each of them one run in its row, and their end: int32."""
    changes_BS = torch.ones_like(document_BS, dtype=torch.bool)
    changes_BS[:, 1:] = document_BS.diff() != 0
    starts = changes_BS.flatten().nonzero().squeeze(1)
    return torch.cat([starts, starts.new_tensor([document_BS.numel()])]).int()


def sees(q: View, k: View) -> Tensor:
    """Whether token q attends to token k, as a bool tensor of the broadcast shape of q and k.

    same document and (k.copy = 0 and k.rank < q.rank, or k.copy = q.copy and k.rank = q.rank and k.order <= q.order)
    """
    context = (k.copy_BS == 0) & (k.rank_BS < q.rank_BS)
    group = (k.copy_BS == q.copy_BS) & (k.rank_BS == q.rank_BS) & (k.order_BS <= q.order_BS)
    return (k.document_BS == q.document_BS) & (context | group)


def near(q: View, k: View, window: int) -> Tensor:
    """Whether token k lies in a sliding window around token q: fewer than `window` positions away on either side.

    For a token that sees no later ones this is the window that transformers' causal models have.
    """
    return (q.position_BS - k.position_BS).abs() < window


def attention_mask(view: View, predicate=sees, keys: View | None = None, window: int | None = None) -> Tensor:
    """The predicate applied to all pairs of a view's tokens and `keys`, by default its own: bool [B, S, K].

    With a `window`, as a layer with sliding-window attention has, only pairs that are near are left.
    """
    q, k = view[:, :, None], (keys or view)[:, None, :]
    seen_BSK = predicate(q, k)
    return seen_BSK if window is None else seen_BSK & near(q, k, window)


def groups(position_BL: Tensor, document_BL: Tensor, block_size: int | None) -> Tensor:
    """For each token the row index at which its block (or document, if block_size is None) starts in this row.

    Blocks lie on a document's own positions counted from 0, so the first and last block of a row may be ragged.
    """
    block_BL = block_start(position_BL, block_size)
    changes_BL = torch.ones_like(document_BL, dtype=torch.bool)
    changes_BL[:, 1:] = (document_BL.diff() != 0) | (block_BL.diff() != 0)
    index_L = torch.arange(document_BL.shape[1], device=document_BL.device)
    return torch.where(changes_BL, index_L, 0).cummax(dim=1).values


def block_start(position: Tensor, block_size: int | None) -> Tensor:
    """The position at which a token's block starts; 0 everywhere if block_size is None (one block per document)."""
    return torch.zeros_like(position) if block_size is None else position // block_size * block_size


def predictors(view: View, mask_id: int, shift: str, first_token: str = "clean") -> Tensor:
    """For each token the index in its row of the token whose hidden state predicts it: int64 [B, S], -1 if absent.

    A token shown as the mask is read at its own position, or with `next_token` shift at the one before; a token shown
    clear always at the one before, because its own state has already seen it. The first token of a block has its
    predecessor in copy 0, as decoding has; `first_token: noisy` takes the predecessor in its own copy instead (the
    public Fast-dLLM v2 code).
    """
    own_BS = torch.arange(view.ids_BS.shape[1], device=view.ids_BS.device).expand_as(view.ids_BS)

    def key(copy_BS: Tensor, position_BS: Tensor) -> Tensor:
        copies = 1 + view.copy_BS.max()
        return ((view.document_BS * copies + copy_BS) << 40) + position_BS

    sorted_BS, index_BS = key(view.copy_BS, view.position_BS).sort(dim=1)

    def before(copy_BS: Tensor) -> Tensor:
        wanted_BS = key(copy_BS, view.position_BS - 1)
        place_BS = torch.searchsorted(sorted_BS, wanted_BS).clamp(max=sorted_BS.shape[1] - 1)
        found_BS = (sorted_BS.gather(1, place_BS) == wanted_BS) & (view.position_BS > 0)
        return torch.where(found_BS, index_BS.gather(1, place_BS), -1)

    previous_BS = before(view.copy_BS)
    from_context_BS = view.position_BS == view.rank_BS
    if first_token == "noisy":  # while decoding, the block before is there as context only
        from_context_BS &= previous_BS < 0
    previous_BS = torch.where(from_context_BS, before(torch.zeros_like(view.copy_BS)), previous_BS)
    return torch.where((view.ids_BS == mask_id) & (shift == "none"), own_BS, previous_BS)


@dataclass(frozen=True)
class Pattern:
    """An attention pattern of the family: how a row and its masks become a view.

    block_size: tokens per block; None is one block per document (full bidirectional), 1 is autoregressive.
    context: what earlier blocks show: `clean` lays noisy copies beside one shared clean copy; `noisy` has no clean
    copy, each block reads the noisy tokens before it.
    context_rank: `block` (the clean copy sees whole blocks) or `causal` (token by token; allows an AR loss on it).
    """

    block_size: int | None
    context: Literal["clean", "noisy"] = "noisy"
    context_rank: Literal["block", "causal"] = "block"

    def __post_init__(self):
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size must be at least 1 or null, not {self.block_size}")
        if self.context == "clean" and self.block_size is None:
            raise ValueError("context: clean needs a block_size; with one block per document there is no context")
        if self.context == "noisy" and self.context_rank == "causal":
            raise ValueError("context_rank: causal needs context: clean; without a clean copy there is none to rank")

    def lay_out(self, batch: Batch, masks: Sequence[Tensor], mask_id: int, with_ar_copy: bool = False) -> View:
        """The view of a batch under one mask per noisy copy (bool [B, L]): S = L × (noisy copies + clean copies).

        Noisy copies come first, in the order of `masks`; a clean copy, where there is one, is last. `with_ar_copy`
        adds, to patterns without a clean copy, one that is its own document: an AR loss can be taken on it, and
        nothing else sees it.
        """
        plain = self._copy(batch, batch.ids_BL, copy=0, block_size=self.block_size)
        if self.context == "noisy" and len(masks) > 1:
            raise ValueError("several noisy copies need context: clean")
        noisy = [
            replace(
                plain,
                ids_BS=torch.where(mask_BL, mask_id, batch.ids_BL),
                copy_BS=torch.full_like(batch.ids_BL, n if self.context == "clean" else 0),
            )
            for n, mask_BL in enumerate(masks, start=1)
        ]
        if self.context == "clean":
            causal = self.context_rank == "causal"
            return View.beside([*noisy, self._copy(batch, batch.ids_BL, 0, 1 if causal else self.block_size)])
        if with_ar_copy:
            clean = self._copy(batch, batch.ids_BL, 0, block_size=1)
            apart = batch.ids_BL.shape[1]  # more than a row has documents
            document_BL = torch.where(batch.document_BL < 0, batch.document_BL - apart, batch.document_BL + apart)
            return View.beside([*noisy, replace(clean, document_BS=document_BL)])
        return View.beside(noisy or [plain])

    def continuation(self, ids_BS: Tensor, position_BS: Tensor, start_B1: Tensor) -> View:
        """The view of tokens of one document per row whose block at `start_B1` is being denoised.

        Tokens before it (a block boundary) are context, the rest is the block; with a noisy context, or none,
        everything is copy 0, as in training.
        """
        zero_BS = torch.zeros_like(ids_BS)
        rank_BS, copy_BS = block_start(position_BS, self.block_size), zero_BS
        if self.context == "clean":
            block_BS = position_BS >= start_B1
            context_BS = position_BS if self.context_rank == "causal" else rank_BS
            rank_BS, copy_BS = torch.where(block_BS, rank_BS, context_BS), block_BS.long()
        return View(ids_BS, position_BS, rank_BS, zero_BS, copy_BS, zero_BS)

    @staticmethod
    def _copy(batch: Batch, ids_BL: Tensor, copy: int, block_size: int | None) -> View:
        rank_BL = block_start(batch.position_BL, block_size)
        order_BL = torch.zeros_like(ids_BL)
        structure = STRUCTURES.get(block_size)
        copy_BL = torch.full_like(ids_BL, copy)
        return View(ids_BL, batch.position_BL, rank_BL, order_BL, copy_BL, batch.document_BL, structure)


AUTOREGRESSIVE = Pattern(block_size=1)
