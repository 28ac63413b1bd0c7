"""Plain block-wise decoding: mask a block, commit what the model is sure of, repeat; exact prefix cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlm_lightning.denoiser import Cache, Denoiser
from dlm_lightning.view import Pattern, sees


@dataclass(frozen=True)
class Decoded:
    """A finished sequence, prompt included, and the canvas after each forward pass (mask ids where nothing is yet)."""

    ids: list[int]
    prompt_tokens: int
    canvases: list[list[int]] = field(repr=False)

    @property
    def new_ids(self) -> list[int]:
        """The tokens after the prompt."""
        return self.ids[self.prompt_tokens :]

    @property
    def tokens_per_forward(self) -> float:
        """TPF: new tokens divided by forward passes."""
        return len(self.new_ids) / max(1, len(self.canvases))


@torch.no_grad()
def decode(
    denoiser: Denoiser,
    prompt_ids: list[int],
    pattern: Pattern,
    new_tokens: int,
    threshold: float,
    eos_id: int | None,
    cached: bool = True,
) -> Decoded:
    """Continue a prompt greedily by `new_tokens` tokens, or up to the first EOS.

    Blocks lie on the document's positions, so the prompt stays visible inside the block it half fills; a pattern
    without blocks fills the whole continuation as one. Each forward commits every masked token whose probability is
    above `threshold`, and at least the surest one. If `cached`, a finished block of a clean context passes the network
    once, in the first forward of the block after it; under a recipe's own predicate, or with masks to fill in the
    prompt, it may be needed anew, and nothing is cached.
    """
    if not prompt_ids:
        raise ValueError("the prompt is empty; a document's first token cannot be predicted")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], not {threshold}")
    device = next(denoiser.parameters()).device
    ids_L = torch.tensor(prompt_ids, device=device)
    total, canvases = len(prompt_ids) + new_tokens, []
    exact = pattern.context == "clean" and denoiser.predicate is sees and denoiser.mask_id not in prompt_ids
    cache = Cache() if cached and exact else None
    while len(ids_L) < total:
        size = pattern.block_size or total
        start = len(ids_L) // size * size
        blank_L = ids_L.new_full((min(start + size, total) - len(ids_L),), denoiser.mask_id)
        ids_L = torch.cat([ids_L, blank_L])
        while (masked_N := (ids_L == denoiser.mask_id).nonzero().squeeze(1)).numel():
            ids_L[masked_N] = _commit(denoiser, pattern, ids_L, start, masked_N, threshold, cache)
            canvases.append(ids_L.tolist())
        if eos_id is not None and eos_id in (new := ids_L.tolist()[len(prompt_ids) :]):
            return Decoded(prompt_ids + new[: new.index(eos_id) + 1], len(prompt_ids), canvases)
    return Decoded(ids_L.tolist(), len(prompt_ids), canvases)


def _commit(
    denoiser: Denoiser,
    pattern: Pattern,
    ids_L: Tensor,
    start: int,
    masked_N: Tensor,
    threshold: float,
    cache: Cache | None,
) -> Tensor:
    known = cache.size if cache else 0
    view = pattern.continuation(ids_L[None], start)[:, known:]
    probability_N, token_N = denoiser(view, masked_N - known, cache=cache).softmax(-1).max(-1)
    sure_N = probability_N > threshold
    sure_N[probability_N.argmax()] = True  # by index: of numbers that are NaN none equals the largest
    return torch.where(sure_N, token_N, denoiser.mask_id)
