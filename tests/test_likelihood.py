"""The block-wise bound against a pass of its own for each block, as a decoder would show it; the chain rule; edges."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dlm_lightning.likelihood import FUTURES, Blocks, bound, redrawn, turns
from dlm_lightning.noise import NELBO
from dlm_lightning.view import AUTOREGRESSIVE, Pattern, groups

PATTERNS = {
    "clean": Pattern(4, "clean"),
    "clean, causal": Pattern(4, "clean", "causal"),
    "noisy": Pattern(4),
    "full": Pattern(None),
}
LENGTH = 11


def shown_mask(pattern: Pattern, block: int, size: int, start: int, length: int) -> torch.Tensor:
    """Who sees whom among a clean prefix and one noisy block at `start`, by the pattern's definition: bool [S, S]."""
    q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
    if pattern.block_size is None:
        return torch.ones(length, length, dtype=torch.bool)
    of_blocks = q // block >= k // block
    if pattern.context_rank == "causal":
        return torch.where(q < start, q >= k, of_blocks)
    return of_blocks


def reference(denoiser, batch, blocks: Blocks, plain_logits) -> torch.Tensor:
    """Each token's share, a pass for each block of the bound, of the batch's one document."""
    own, size = denoiser.pattern, blocks.size
    masked = blocks.future == "masked"
    group = (max(size, own.block_size) if masked else size) if own.block_size else LENGTH
    block_1L = groups(batch.position_BL, batch.document_BL, size)
    mask_1L, weight_1L = NELBO.draw(batch.u_BL, batch.t_BL, batch.maskable_BL, block_1L, block_1L)
    ids_L, share_L = batch.ids_BL[0], torch.zeros(LENGTH)
    for start in range(0, LENGTH, size):
        stop = min(start + size, LENGTH)
        end = min(start // group * group + group, LENGTH) if masked else stop
        shown_S = ids_L[:end].clone()
        shown_S[start:stop][mask_1L[0, start:stop]] = denoiser.mask_id
        shown_S[stop:] = denoiser.mask_id
        mask_SS = shown_mask(own, group, size, start // group * group, end)
        logits_SV = plain_logits(denoiser, shown_S, torch.arange(end), mask_SS)
        logits_SV[:, denoiser.mask_id] = -torch.inf
        for i in range(start, stop):
            if mask_1L[0, i]:
                read = i - (denoiser.shift == "next_token")
                share_L[i] = -logits_SV[read].log_softmax(0)[ids_L[i]] * weight_1L[0, i]
    return share_L


@pytest.mark.parametrize("future", FUTURES)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("shift", ["none", "next_token"])
@pytest.mark.parametrize("name", PATTERNS)
def test_every_block_is_what_a_pass_of_its_own_gives(
    name, shift, size, future, make_denoiser, make_batch, plain_logits
):
    denoiser = make_denoiser(pattern=PATTERNS[name], shift=shift)
    batch, blocks = make_batch([[LENGTH]]), Blocks(size, future)
    with torch.no_grad():
        parts = [bound(denoiser, batch, blocks, turn).share_BL for turn in range(turns(denoiser, batch, blocks))]
    torch.testing.assert_close(sum(parts)[0], reference(denoiser, batch, blocks, plain_logits), rtol=1e-4, atol=1e-5)
    assert all((part > 0).any() for part in parts)


@pytest.mark.parametrize("future", FUTURES)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_chosen_block_counts_for_all_of_its_group(name, future, make_denoiser, make_batch):
    """The mean over all choices is the sum over all turns."""
    denoiser, blocks = make_denoiser(pattern=PATTERNS[name]), Blocks(2, future)
    batch = make_batch([[7, 8], [12]], prompts={(0, 1): 3}, length=16)
    count = turns(denoiser, batch, blocks)
    choices = math.lcm(*range(1, count + 1))
    with torch.no_grad():
        whole = sum(bound(denoiser, batch, blocks, turn).share_BL for turn in range(count))
        mean = sum(
            bound(denoiser, batch, blocks, torch.full_like(batch.t_BL, (n + 0.5) / choices)).share_BL
            for n in range(choices)
        )
    torch.testing.assert_close(mean / choices, whole, rtol=1e-4, atol=1e-5)
    assert ((whole > 0) <= batch.maskable_BL).all()


@pytest.mark.parametrize("name", ["clean", "clean, causal", "noisy"])
def test_blocks_of_one_token_of_an_unconverted_source_give_its_own_likelihood(name, make_denoiser, make_batch):
    batch = make_batch([[9, 5], [14]], length=16)
    ar = make_denoiser(pattern=AUTOREGRESSIVE, shift="next_token")
    converted = make_denoiser(pattern=PATTERNS[name], shift="next_token")
    with torch.no_grad():
        own = bound(ar, batch, Blocks(1), 0).share_BL
        by_blocks = bound(converted, batch, Blocks(1, "absent"), 0).share_BL
    torch.testing.assert_close(by_blocks, own, rtol=1e-4, atol=1e-5)
    assert ((own > 0) == batch.maskable_BL).all()


def test_the_bound_is_the_mean_chain_rule_over_all_orders(make_denoiser, make_batch, plain_logits):
    """Exactly so in expectation: over all noise levels and masks of a block of three tokens."""
    denoiser = make_denoiser(pattern=Pattern(4, "clean"))
    batch = make_batch([[4]])
    ids_L, everything = batch.ids_BL[0], torch.ones(4, 4, dtype=torch.bool)

    def nll(known: tuple[int, ...], i: int) -> float:
        shown = torch.tensor([token if n in (0, *known) else 300 for n, token in enumerate(ids_L.tolist())])
        logits_V = plain_logits(denoiser, shown, torch.arange(4), everything)[i]
        logits_V[300] = -torch.inf
        return -logits_V.log_softmax(0)[ids_L[i]].item()

    orders = list(itertools.permutations((1, 2, 3)))
    over_orders = sum(nll(order[:n], order[n]) for order in orders for n in range(3)) / len(orders)
    total, count = 0.0, 0
    for order in orders:  # u decides by its order, and each order is one of six equally likely ones
        for k in (1, 2, 3):
            u_1L = torch.tensor([[0.5, *(0.2 + 0.2 * order.index(i) for i in (1, 2, 3))]])
            drawn = batch._replace(u_BL=u_1L, t_BL=torch.full((1, 4), k / 3))
            with torch.no_grad():
                total += bound(denoiser, drawn, Blocks(4), 0).share_BL.sum().item()
            count += 1
    assert total / count == pytest.approx(over_orders, rel=1e-5)


def test_noise_is_a_function_of_seed_draw_and_place(make_batch):
    batch = make_batch([[16], [16], []], length=16)
    (one, choice), (same, _), (other, other_choice) = (redrawn(batch, 7, 4, draw) for draw in (0, 0, 1))
    assert torch.equal(one.u_BL, same.u_BL) and torch.equal(one.t_BL, same.t_BL)
    tensors = [one.u_BL, other.u_BL, one.t_BL, other.t_BL, choice, other_choice]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(tensors, 2))
    alone, _ = redrawn(type(batch)(*(tensor[1:2] for tensor in batch)), 7, 4, 0)
    assert torch.equal(alone.u_BL[0], one.u_BL[1])


def test_the_first_token_of_a_block_is_read_as_decoders_read_it(make_denoiser, make_batch):
    clean, noisy = (
        make_denoiser(pattern=PATTERNS["clean"], shift="next_token", first_token=first) for first in ("clean", "noisy")
    )
    batch = make_batch([[12]])
    with torch.no_grad():
        assert torch.equal(bound(clean, batch, Blocks(4), 0).nll_BL, bound(noisy, batch, Blocks(4), 0).nll_BL)
    assert noisy.first_token == "noisy"


def test_the_level_is_the_masked_share_of_a_block(make_denoiser, make_batch):
    denoiser, batch = make_denoiser(pattern=Pattern(None)), make_batch([[12]])
    with torch.no_grad():
        done = bound(denoiser, batch, Blocks(4), torch.full_like(batch.t_BL, 0.5))
    masked = done.nll_BL > 0
    assert (masked == (done.level_BL > 0)).all()
    assert done.level_BL[masked].tolist() == [masked.sum() / 4] * int(masked.sum())  # the second block, of three
    assert done.weight_BL[masked].tolist() == pytest.approx([3 * 4 / masked.sum().item()] * int(masked.sum()))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Blocks(0), "at least 1, not 0"),
        (lambda: Blocks(4, "past"), "masked or absent, not past"),
        (lambda: Blocks(4).pattern(AUTOREGRESSIVE), "never saw a mask"),
        (lambda: Blocks(3).pattern(Pattern(4, "clean")), "3 does not divide the model's block, 4"),
    ],
)
def test_what_is_no_bound_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
