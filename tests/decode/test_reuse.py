"""What each forward shows, against the papers' definitions; what it then computes, against transformers' own cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from dlm_lightning.decode.canvas import Canvas
from dlm_lightning.decode.decoder import decode
from dlm_lightning.decode.plan import Plan
from dlm_lightning.decode.reuse import Delayed, Greedy, Prefix, Reuse, SubBlock
from dlm_lightning.decode.selector import RandomOrder, Threshold
from dlm_lightning.decode.stopper import Stopper
from dlm_lightning.view import Pattern

MASK = 300
PROMPT = [17, 250, 3, 99, 41, 8, 77, 5]


@dataclass
class Recorded(Reuse):
    """Another one, and what it saw and said of the only row."""

    inner: Reuse
    before: list[list[int]] = field(default_factory=list)  # tokens
    candidates: list[set[int]] = field(default_factory=list)
    sets: list[set[int]] = field(default_factory=list)  # positions shown

    def check(self, denoiser, pattern):
        self.inner.check(denoiser, pattern)

    def shown(self, canvas: Canvas, candidates_BL: Tensor, shifted: bool) -> Tensor:
        shown_BL = self.inner.shown(canvas, candidates_BL, shifted)
        self.before.append(canvas.ids_BL[0].tolist())
        self.candidates.append(set(candidates_BL[0].nonzero().flatten().tolist()))
        self.sets.append(set(shown_BL[0].nonzero().flatten().tolist()))
        return shown_BL


def masks(ids: list[int]) -> set[int]:
    return {i for i, token in enumerate(ids) if token == MASK}


def record(denoiser, inner: Reuse, new_tokens: int, selector=None, **parts) -> tuple[Recorded, list[Tensor]]:
    recorded, logits = Recorded(inner), []
    hook = denoiser.register_forward_hook(lambda _, __, out: logits.append(out[:, :MASK]))
    stopper = Stopper(new_tokens, eos=False)
    decode(denoiser, [PROMPT], Plan(cache=recorded, selector=selector or Threshold(0.1), stopper=stopper, **parts))
    hook.remove()
    return recorded, logits


@pytest.mark.parametrize("shift", ["none", "next_token"])
def test_a_part_alone_is_shown_while_its_first_token_is_known(make_denoiser, shift):
    """Fast-dLLM v2: block 8, parts of 4; the whole block when it begins and while a part's first token is a mask."""
    denoiser = make_denoiser(shift=shift, pattern=Pattern(8, "clean"))
    recorded, _ = record(denoiser, SubBlock(), 16, Threshold(1.0), part_size=4)
    fresh = {8, 16}  # blocks of which nothing was shown
    for ids, shown in zip(recorded.before, recorded.sets, strict=True):
        first = min(masks(ids))
        block, part = first // 8 * 8, first // 4 * 4
        whole = set(range(block, block + 8))
        if block in fresh:
            expected = whole | set(range(block - 8, block))  # the block before is kept by the same forward
            fresh.remove(block)
        else:
            expected = whole if ids[part] == MASK else set(range(part, part + 4))
        assert shown == expected
    assert not fresh and len(recorded.sets) == 16
    assert sum(len(shown) == 4 for shown in recorded.sets) >= 4


@pytest.mark.parametrize("refresh", [3, 8])
@pytest.mark.parametrize("block_size", [None, 8])
def test_a_token_is_shown_once_more_after_it_was_filled_in(make_denoiser, refresh, block_size):
    """dKV-Cache-Decode, equation 4: at step t the tokens of M_{t-1}, the masks before step t - 1."""
    denoiser = make_denoiser(pattern=Pattern(None))
    recorded, _ = record(denoiser, Delayed(refresh), 16, Threshold(1.0), block_size=block_size)
    step, block = 0, 0
    for t, (ids, shown) in enumerate(zip(recorded.before, recorded.sets, strict=True)):
        if block_size and min(masks(ids)) // block_size != block:
            step, block = 0, min(masks(ids)) // block_size
        everything = step % refresh == 0 or step < 2
        assert shown == (set(range(24)) if everything else masks(recorded.before[t - 1]))
        step += 1
    assert any(len(shown) < 24 for shown in recorded.sets)


def test_with_shift_a_token_stays_until_the_next_one_is_known_too(make_denoiser):
    denoiser = make_denoiser(shift="next_token", pattern=Pattern(None))
    recorded, _ = record(denoiser, Delayed(100), 16, Threshold(1.0))
    for t in range(2, len(recorded.sets)):
        now, before = masks(recorded.before[t]), masks(recorded.before[t - 1])
        assert recorded.sets[t] == before | {i - 1 for i in now}


@pytest.mark.parametrize("window", [0, 2, 4])
@pytest.mark.parametrize("shift", ["none", "next_token"])
def test_greedy_shows_what_is_filled_in_what_just_was_and_the_masks_around(make_denoiser, window, shift):
    denoiser = make_denoiser(shift=shift, pattern=Pattern(None))
    recorded, _ = record(denoiser, Greedy(window, refresh=3), 16, RandomOrder(2))
    just: set[int] = set()
    for t, (ids, now, shown) in enumerate(zip(recorded.before, recorded.candidates, recorded.sets, strict=True)):
        around = {i for c in now for i in range(c - window // 2, c + window // 2 + 1)} & masks(ids)
        read = {i - 1 for i in now} if shift == "next_token" else set()
        assert shown == (set(range(24)) if t % 3 == 0 else now | just | around | read)
        just = now
    assert any(len(shown) < 24 for shown in recorded.sets)


def by_transformers(
    network, ids: list[int], shown: set[int], held: dict[int, list[tuple[Tensor, Tensor]]], block: int
) -> Tensor:
    """Hidden states of what is shown, [S, D], in attention to it and to what `held` has of earlier forwards."""
    others, columns = sorted(held.keys() - shown), sorted(shown)
    cache, keys = DynamicCache(), others + columns
    for layer in range(network.config.num_hidden_layers) if others else []:
        cache.update(*(torch.stack([held[i][layer][n] for i in others], 2) for n in (0, 1)), layer)
    out = network.model(
        input_ids=torch.tensor([[ids[i] for i in columns]]),
        position_ids=torch.tensor([columns]),
        attention_mask=torch.tensor([[[[0.0 if k // block <= q // block else -1e9 for k in keys] for q in columns]]]),
        past_key_values=cache,
        use_cache=True,
    )
    for place, i in enumerate(columns, len(others)):
        held[i] = [(layer.keys[:, :, place], layer.values[:, :, place]) for layer in cache.layers]
    return out.last_hidden_state[0]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("shift", ["none", "next_token"])
@pytest.mark.parametrize(
    "pattern, inner, parts",
    [
        (Pattern(None), Delayed(4), {}),
        (Pattern(None), Delayed(4), {"block_size": 8}),
        (Pattern(None), Greedy(2, 3), {"selector": RandomOrder(2)}),
        (Pattern(8, "clean"), SubBlock(), {"part_size": 2}),
        (Pattern(8, "noisy"), SubBlock(), {"part_size": 4}),
        (Pattern(8, "clean"), Delayed(4), {}),
    ],
    ids=["delayed", "delayed in blocks", "greedy", "parts", "parts, noisy context", "delayed, clean context"],
)
def test_approximations_compute_what_transformers_does_with_the_same_old_keys(
    make_denoiser, source_folder, family, shift, pattern, inner, parts
):
    denoiser = make_denoiser(family, shift=shift, pattern=pattern)
    recorded, logits = record(denoiser, inner, 16, **parts)
    network = AutoModelForCausalLM.from_pretrained(source_folder(family), attn_implementation="eager")
    network.resize_token_embeddings(MASK + 1)
    network.load_state_dict(denoiser.network.state_dict())
    held: dict[int, list[tuple[Tensor, Tensor]]] = {}
    hidden: dict[int, Tensor] = {}
    with torch.no_grad():
        for ids, candidates, shown, found_NV in zip(
            recorded.before, recorded.candidates, recorded.sets, logits, strict=True
        ):
            for i, state_D in zip(
                sorted(shown), by_transformers(network, ids, shown, held, pattern.block_size or 99), strict=True
            ):
                hidden[i] = state_D
            read = [i - (shift == "next_token") for i in sorted(candidates)]
            expected_NV = network.lm_head(torch.stack([hidden[i] for i in read]))[:, :MASK]
            assert (found_NV - expected_NV).abs().max() <= 1e-4 * expected_NV.abs().max()
    assert len(logits) > 4


@pytest.mark.parametrize("context_rank", ["block", "causal"])
def test_the_old_keys_of_a_block_are_those_of_its_last_whole_forward(make_denoiser, context_rank):
    """With parts of 8 = the block, nothing is old: the hierarchical cache is then the prefix cache."""
    denoiser = make_denoiser(shift="next_token", pattern=Pattern(8, "clean", context_rank))
    one, other = (record(denoiser, inner, 16, part_size=8) for inner in (SubBlock(), Prefix()))
    assert one[0].sets == other[0].sets
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    parts, _ = record(denoiser, SubBlock(), 16, part_size=2)
    assert parts.before != one[0].before


def test_values_out_of_range_are_refused():
    for wrong in (lambda: Delayed(0), lambda: Greedy(refresh=0), lambda: Greedy(window=-1)):
        with pytest.raises(ValueError, match="must be at least"):
            wrong()
