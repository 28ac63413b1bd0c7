"""Decoding: prompts and masks after them, filled in forward by forward.

Shapes: B rows, L tokens of the longest row when it is full, S tokens of a row that a forward shows, N masks that it may
fill in, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dlm_lightning.cache import Cache
from dlm_lightning.decode.canvas import Canvas
from dlm_lightning.decode.plan import Plan
from dlm_lightning.decode.scorer import SCORERS
from dlm_lightning.denoiser import Denoiser
from dlm_lightning.view import sees

SLOTS = 64  # of which a static cache has a multiple
GRAPHS = 64  # that a compiled network may have, for its widths and batches


@dataclass(frozen=True)
class Row:
    """A finished document.

    ids: its tokens, prompt included.
    prompt_tokens: how many of them are the prompt's.
    forwards: NFE, prefill included.
    shown: tokens that passed the network, added over the forwards.
    seen: those that would have without a cache.
    """

    ids: list[int]
    prompt_tokens: int
    forwards: int
    shown: int
    seen: int

    @property
    def new_ids(self) -> list[int]:
        """The tokens after the prompt."""
        return self.ids[self.prompt_tokens :]


@dataclass(frozen=True)
class Decoded:
    """What came of a batch of prompts, in their order, and the seconds it took."""

    rows: list[Row]
    seconds: float

    @property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return sum(len(row.new_ids) for row in self.rows)

    @property
    def forwards(self) -> int:
        """NFE of all rows; a forward counts once for each row that was in it."""
        return sum(row.forwards for row in self.rows)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens divided by NFE (TPF)."""
        return self.tokens / max(1, self.forwards)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def cached_share(self) -> float:
        """Share of the tokens looked at that did not pass the network, over all forwards."""
        seen = sum(row.seen for row in self.rows)
        return 1 - sum(row.shown for row in self.rows) / seen if seen else 0.0


@torch.no_grad()
def decode(
    denoiser: Denoiser,
    prompts: Sequence[Sequence[int]],
    plan: Plan,
    *,
    text: Callable[[list[int]], str] | None = None,
    watch: Callable[[Canvas], None] | None = None,
    first: int = 0,
    eos_ids: Collection[int | None] = (),
    static: bool | None = None,
) -> Decoded:
    """Continue prompts of any lengths, a row each; what comes of one does not depend on the others.

    `text` turns token ids into text, for stop strings. `watch` is called after each forward. `first` is the first row's
    number, by which it draws tokens. `eos_ids` end a text beside those that the network's configs name. `static` fills
    up what a forward is given so that few shapes occur, by default on a GPU; tokens are the same. Raises ValueError for
    a prompt that is empty, begins with the mask, has unknown tokens or does not fit into the model's positions, and for
    a plan that the model's pattern cannot follow.
    """
    began = time.perf_counter()
    plan.check(denoiser)
    if not prompts:
        return Decoded([], 0.0)
    if plan.stopper.strings and text is None:
        raise ValueError("stop strings need the tokenizer, to know the text of tokens")
    check_prompts(denoiser, prompts, plan.stopper.new_tokens)
    pattern = plan.pattern(denoiser.pattern)
    ahead = pattern.block_size is None
    device = next(denoiser.parameters()).device
    static = device.type == "cuda" if static is None else static
    L = max(len(prompt) for prompt in prompts) + plan.stopper.new_tokens
    L = -(-L // SLOTS) * SLOTS if static else L
    canvas = Canvas(
        prompts,
        plan.stopper.new_tokens,
        plan.block_size if ahead else pattern.block_size,
        plan.part_size,
        denoiser.mask_id,
        ahead,
        device,
        L,
    )
    ends_with, shifted, score = end_tokens(denoiser, eos_ids), denoiser.shift != "none", SCORERS[plan.scorer]
    cache = Cache(L, static)
    whole = pattern.block_size if static and plan.cache.whole_blocks and pattern.context_rank == "block" else None
    rows: dict[int, Row] = {}
    forwards, shown, seen = ([0] * len(prompts) for _ in range(3))
    while True:
        ends, numbers = plan.stopper.ends(canvas, ends_with, text), canvas.number_B.tolist()
        for row, (end, number) in enumerate(zip(ends, numbers, strict=True)):
            if end is not None:
                ids = canvas.ids_BL[row, :end].tolist()
                rows[number] = Row(ids, len(prompts[number]), forwards[number], shown[number], seen[number])
        if None not in ends:
            return Decoded([rows[number] for number in range(len(prompts))], time.perf_counter() - began)
        if len(rows) < len(prompts) and any(end is not None for end in ends):
            left_N = torch.tensor([row for row, end in enumerate(ends) if end is None], device=device)
            canvas.select(left_N)
            cache.select(left_N)
            numbers = canvas.number_B.tolist()

        candidates_BL = plan.selector.candidates(canvas)
        shown_BL = plan.cache.shown(canvas, candidates_BL, shifted)
        for number, passed, reach in zip(numbers, shown_BL.sum(1).tolist(), canvas.reach_B.tolist(), strict=True):
            forwards[number] += 1
            shown[number] += passed
            seen[number] += reach
        column_BS = _columns(shown_BL, whole or 1)
        view = pattern.continuation(canvas.ids_BL.gather(1, column_BS), column_BS, canvas.start_B[:, None])
        view = replace(view, structure=whole)
        canvas.show(shown_BL)

        index_N = candidates_BL.flatten().nonzero().squeeze(1)
        logits_NV = denoiser(view, index_N, cache=cache)
        plan.stopper.forbid(logits_NV, index_N, canvas, ends_with)
        token_N = plan.sampling.draw(
            logits_NV, [first + number for number in numbers], [forwards[number] for number in numbers], index_N, L
        )
        score_BL = torch.full(candidates_BL.shape, -torch.inf, device=device)
        score_BL.view(-1)[index_N] = score(logits_NV.softmax(1), token_N)
        if (
            shifted and not ahead and denoiser.predicate is sees
        ):  # read from the context, where nothing changes any more
            score_BL[candidates_BL & (canvas.position_L == canvas.start_B[:, None])] = torch.inf
        token_BL = canvas.ids_BL.clone()
        token_BL.view(-1)[index_N] = token_N
        canvas.commit(plan.selector.choose(score_BL, canvas), token_BL)
        if watch:
            watch(canvas)


def compiled(denoiser: Denoiser, **options: Any) -> Denoiser:
    """The Denoiser with its network compiled in place by `torch.compile` and its options; tokens are the same."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    denoiser.network.base_model.compile(**options)
    return denoiser


def _columns(shown_BL: Tensor, size: int) -> Tensor:
    """The positions shown, int64 [B, S], S a multiple of `size`; rows of fewer repeat their last."""
    count_B = shown_BL.sum(1)
    order_BL = (~shown_BL).long().argsort(dim=1, stable=True)
    place_S = torch.arange(-(-int(count_B.max()) // size) * size, device=shown_BL.device)
    return order_BL.gather(1, torch.minimum(place_S, count_B[:, None] - 1))


def end_tokens(denoiser: Denoiser, others: Collection[int | None]) -> list[int]:
    """The end-of-text tokens of the network's configs, and others."""
    network = denoiser.network
    found = {token for token in others if token is not None}
    for config in (network.config, getattr(network, "generation_config", None)):
        ids = getattr(config, "eos_token_id", None)
        found |= set(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return sorted(found)


def check_prompts(denoiser: Denoiser, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Raise ValueError, naming it, for a prompt that cannot be continued by so many tokens."""
    config = denoiser.network.config
    vocabulary, positions = config.vocab_size, getattr(config, "max_position_embeddings", None)
    for number, prompt in enumerate(prompts):
        where = f"prompt {number + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        if not len(prompt):
            raise ValueError(f"{where} is empty; a document's first token cannot be predicted")
        if prompt[0] == denoiser.mask_id:
            raise ValueError(f"{where} begins with the mask; a document's first token cannot be predicted")
        if unknown := [token for token in prompt if not 0 <= token < vocabulary]:
            raise ValueError(f"{where} has token {unknown[0]}, and the vocabulary {vocabulary} tokens")
        if positions and len(prompt) + new_tokens > positions:
            raise ValueError(
                f"{where} has {len(prompt)} tokens and {new_tokens} are to come; the model has {positions} positions"
            )
