"""Uniforms, maskings and weights, against counts by loops and the formulas of the papers."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dlm_lightning.noise import NELBO, STRATA, Masked, Noise, rank_in_group, raw, uniforms
from dlm_lightning.view import groups

PAIRS = {
    ("bernoulli", "inverse_p"),
    ("exact", "count_ratio"),
    ("exact_round", "inverse_t"),
    ("tilted", "inverse_t"),
    ("tilted", "count_ratio"),
    ("complementary", "one"),
}
NOISES = [Noise(masking, weight, t_per) for masking, weight in sorted(PAIRS) for t_per in ("block", "document")]


def draw(noise: Noise, batch, block_size: int | None) -> Masked:
    block_BL = groups(batch.position_BL, batch.document_BL, block_size)
    return noise.draw(
        batch.u_BL, batch.t_BL, batch.maskable_BL, block_BL, groups(batch.position_BL, batch.document_BL, None)
    )


def draw_blocks(noise: Noise, t: float, size: int, count: int) -> Masked:
    """`count` rows of one fully maskable block each, at noise level t."""
    u_BL, _ = uniforms(0, 0, 0, 0, 0, count * size)
    zero_BL = torch.zeros(count, size, dtype=torch.long)
    whole_BL = torch.ones(count, size, dtype=torch.bool)
    return noise.draw(u_BL.view(count, size), torch.full((count, size), t), whole_BL, zero_BL, zero_BL)


# Uniforms


def test_uniforms_are_a_pure_function_of_the_sample():
    names = [(seed, stream, place, epoch, view) for seed, stream, place, epoch, view in product(*[(0, 1)] * 5)]
    forward = [uniforms(*name, 50) for name in names]
    backward = [uniforms(*name, 50) for name in reversed(names)][::-1]
    for (u, t), (u_again, t_again) in zip(forward, backward, strict=True):
        assert torch.equal(u, u_again) and torch.equal(t, t_again)
    for (u, t), (other_u, other_t) in combinations(forward, 2):
        assert (u == other_u).sum() < 3 and (t == other_t).sum() < 3


def test_uniforms_do_not_depend_on_the_row_length():
    for long, short in zip(uniforms(3, 0, 7, 1, 0, 100), uniforms(3, 0, 7, 1, 0, 40), strict=True):
        assert torch.equal(long[:40], short)


def test_uniforms_stay_in_their_ranges_at_the_extreme_words(monkeypatch):
    for word, u, t in [(0, 0.0, 2**-24), (2**64 - 1, 1 - 2**-24, 1.0)]:
        monkeypatch.setattr("dlm_lightning.noise.raw", lambda *_, count, word=word: np.full(count, word, np.uint64))
        u_L, t_L = uniforms(0, 0, 0, 0, 0, 3)
        assert u_L.dtype == t_L.dtype == torch.float32
        assert u_L.tolist() == [u] * 3 and t_L.tolist() == [t] * 3


def test_each_aligned_run_of_places_shares_out_the_strata_slot_by_slot():
    for first in (0, 5 * STRATA):
        t_PL = torch.stack([uniforms(1, 0, place, 2, 0, 40)[1] for place in range(first, first + STRATA)])
        strata_PL = (t_PL.double() * STRATA).ceil().long() - 1
        assert torch.equal(strata_PL.sort(0).values, torch.arange(STRATA)[:, None].expand(STRATA, 40))
        assert len({tuple(column) for column in strata_PL.T.tolist()}) > 5  # slots turn separately


@pytest.mark.parametrize("place", [0, 3])
def test_uniforms_of_one_sample_are_uniform_and_independent(place):
    n = 2**15
    u_L, t_L = uniforms(0, 0, place, 0, 0, n)
    even = torch.arange(1, n + 1) / n
    for x_L in (u_L, t_L):
        assert (x_L.sort().values - even).abs().max() < 2 / math.sqrt(n)  # Kolmogorov: 1.63 at 1 %
    strata_L = (t_L * STRATA).ceil().long() - 1
    within_L = ((t_L * STRATA - strata_L) * 2**20).long() % STRATA  # the last bits of the place inside a stratum
    for other_L in (strata_L.roll(1), (u_L * STRATA).long(), within_L):
        table = torch.bincount(strata_L * STRATA + other_L, minlength=STRATA**2)
        chi_square = ((table - n / STRATA**2) ** 2 / (n / STRATA**2)).sum()
        assert 150 < chi_square < 400  # 255 ± 23


def test_a_slot_is_uniform_over_samples():
    t_P = torch.stack([uniforms(0, 0, place, 0, 0, 1)[1] for place in range(64 * STRATA)]).flatten()
    even = torch.arange(1, len(t_P) + 1) / len(t_P)
    assert (t_P.sort().values - even).abs().max() < 1 / STRATA / 2


def test_raw_is_numpys_philox_at_the_named_counter():
    words = raw(7, 1, 2, 3, 4, count=9)
    assert words.dtype == np.uint64
    assert np.array_equal(words[4:], np.random.Philox(key=[7, 1], counter=[1, 2, 3, 4]).random_raw(5))


def test_any_integer_is_a_seed_of_its_own():
    words = [tuple(raw(seed, 0, count=2).tolist()) for seed in (-1, -2, -3, 0, 1, 2**63, 2**63 + 1)]
    assert len(set(words)) == len(words)


# Maskings


def test_bernoulli_masks_with_probability_p():
    n = 1000
    zero_BL = torch.zeros(1, n, dtype=torch.long)
    u_BL = ((torch.arange(n) + 0.5) / n)[None]
    for t, eps in [(0.3, 0.1), (1.0, 1e-3), (1e-6, 0.05), (0.5, 0.0)]:
        noise = Noise("bernoulli", "inverse_p", eps=eps)
        masked = noise.draw(u_BL, torch.full((1, n), t), torch.ones(1, n, dtype=torch.bool), zero_BL, zero_BL)
        p = (1 - eps) * t + eps
        assert masked.mask_BL.sum().item() == pytest.approx(n * p, abs=1)
        assert masked.weight_BL[masked.mask_BL].numpy() == pytest.approx(1 / p)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: f"{n.masking}-{n.weight}-{n.t_per}")
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    start=st.sampled_from([0, 37]),
    prompt=st.integers(0, 5),
    block=st.sampled_from([None, 1, 3, 4]),
    seed=st.integers(0, 1000),
)
def test_counts_weights_and_maskable_tokens_group_by_group(make_batch, noise, lengths, start, prompt, block, seed):
    batch = make_batch([lengths], sum(lengths) + 2, {(0, 0): start + prompt}, {(0, 0): start}, seed=seed)
    mask_BL, weight_BL = draw(noise, batch, block)
    assert weight_BL.dtype == torch.float32
    assert not (mask_BL & ~batch.maskable_BL).any()
    assert not weight_BL[~mask_BL].any() and (weight_BL[mask_BL] > 0).all()
    size = block if noise.t_per == "block" else None
    group_L = groups(batch.position_BL, batch.document_BL, size)[0]
    for first in set(group_L.tolist()):
        members = (group_L == first) & batch.maskable_BL[0]
        t, of = batch.t_BL[0, first].item(), members.sum().item()
        count, weights = mask_BL[0, members].sum().item(), weight_BL[0, members & mask_BL[0]].numpy()
        if noise.masking == "exact":
            assert count == math.ceil(t * of)
            assert weights.sum() == pytest.approx(of)  # so the block's NELBO weighs the same at any t
        if noise.masking in ("exact_round", "tilted"):
            assert count == round(t * of)
        if noise.weight == "count_ratio" and count:
            assert weights == pytest.approx(of / count)
        if noise.weight == "inverse_t":
            assert weights == pytest.approx(1 / t)
        if noise.weight == "inverse_p":
            assert weights == pytest.approx(1 / ((1 - noise.eps) * t + noise.eps))
        if noise.weight == "one":
            assert weights == pytest.approx(1)


def test_exact_counts_are_uniform_from_one_to_all():
    t_B = (torch.arange(600) + 0.5) / 600
    for size in (1, 3, 4, 5):
        shape = (600, size)
        zero_BL, whole_BL = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool)
        masked = NELBO.draw(torch.rand(shape), t_B[:, None].expand(shape), whole_BL, zero_BL, zero_BL)
        assert Counter(masked.mask_BL.sum(1).tolist()) == {k: 600 // size for k in range(1, size + 1)}


@pytest.mark.parametrize("noise", [NELBO, Noise("tilted", "inverse_t", half_life=1e6)], ids=["exact", "no tilt"])
def test_masks_of_a_given_count_are_equally_likely(noise):
    count = 6000
    masks = draw_blocks(noise, 0.5, 4, count).mask_BL
    seen = Counter(tuple(mask.nonzero().squeeze(1).tolist()) for mask in masks)
    assert set(seen) == set(combinations(range(4), 2))
    spread = 5 * math.sqrt(count * 1 / 6 * 5 / 6)
    assert all(abs(n - count / 6) < spread for n in seen.values())


@pytest.mark.parametrize("half_life", [0.1, 0.5, 2.0])
def test_tilted_first_choice_follows_the_papers_weights(half_life):
    size, count, t = 8, 20000, 1 / 8  # k = round(t·L') = 1
    mask_BL = draw_blocks(Noise("tilted", "inverse_t", half_life=half_life), t, size, count).mask_BL
    assert torch.equal(mask_BL.sum(1), torch.ones(count, dtype=torch.long))
    beta = math.log(2) / (half_life * size)
    weights = [math.exp(beta * (1 - t) * i) for i in range(size)]
    expected_L = torch.tensor(weights) / sum(weights) * count
    assert ((mask_BL.sum(0) - expected_L).abs() < 5 * expected_L.sqrt() + 1).all()


def test_half_life_is_the_share_of_a_block_over_which_the_weight_doubles():
    size, count, t = 16, 40000, 1 / 16
    frequency_L = draw_blocks(Noise("tilted", "inverse_t", half_life=0.5), t, size, count).mask_BL.sum(0)
    doubled = frequency_L[8:].sum() / frequency_L[:8].sum()  # 8 tokens are half a block
    assert doubled.item() == pytest.approx(2 ** (1 - t), rel=0.05)


def test_tilt_counts_only_maskable_tokens():
    u_BL, _ = uniforms(0, 0, 0, 0, 0, 20000 * 8)
    zero_BL = torch.zeros(20000, 8, dtype=torch.long)
    maskable_BL = torch.tensor([False, True, False, True, True, False, True, False]).expand(20000, 8)
    noise = Noise("tilted", "inverse_t", half_life=0.5)
    drawn = noise.draw(u_BL.view(-1, 8), torch.full((20000, 8), 0.25), maskable_BL, zero_BL, zero_BL)
    weights = torch.tensor([2 ** (0.75 * i / 2) for i in range(4)])  # λL' = 2 maskable tokens
    expected = weights / weights.sum() * 20000
    assert ((drawn.mask_BL.sum(0)[maskable_BL[0]] - expected).abs() < 5 * expected.sqrt()).all()


def test_tilted_at_the_limits():
    rightmost = draw_blocks(Noise("tilted", "inverse_t", half_life=1e-9), 0.375, 8, 200).mask_BL
    assert torch.equal(rightmost, torch.arange(8).expand(200, 8) >= 5)
    everything = draw_blocks(Noise("tilted", "inverse_t", half_life=1e-9), 1.0, 8, 1)
    assert everything.mask_BL.all() and torch.equal(everything.weight_BL, torch.ones(1, 8))


def test_a_group_reads_the_t_of_its_first_token(make_batch):
    batch = make_batch([[6, 5]], starts={(0, 0): 2})
    for t_per, size in [("block", 4), ("document", None)]:
        noise = Noise("exact_round", "inverse_t", t_per)
        first_BL = groups(batch.position_BL, batch.document_BL, size)
        slots_BL = torch.zeros_like(batch.maskable_BL).scatter(1, first_BL, True)
        other = batch._replace(t_BL=torch.where(slots_BL, batch.t_BL, 0.5))
        for a, b in zip(draw(noise, batch, 4), draw(noise, other, 4), strict=True):
            assert torch.equal(a, b)
        moved = batch._replace(t_BL=torch.where(slots_BL, batch.t_BL / 2, batch.t_BL))
        assert not torch.equal(draw(noise, batch, 4).weight_BL, draw(noise, moved, 4).weight_BL)


def test_masks_depend_on_the_order_of_u_and_on_nothing_random():
    first, again = (draw_blocks(NELBO, 0.5, 6, 10) for _ in range(2))
    assert torch.equal(first.mask_BL, again.mask_BL)
    zero_BL = torch.zeros(1, 4, dtype=torch.long)
    u_BL = torch.tensor([[0.0, 0.9, 0.2, 1 - 2**-24]])
    masked = NELBO.draw(u_BL, torch.full((1, 4), 0.5), torch.ones(1, 4, dtype=torch.bool), zero_BL, zero_BL)
    assert masked.mask_BL.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: f"{n.masking}-{n.weight}-{n.t_per}")
def test_rows_without_maskable_tokens_are_left_alone(make_batch, noise):
    batch = make_batch([[], [1], [4]], length=4, prompts={(2, 0): 4})
    masked = draw(noise, batch, 2)
    assert not masked.mask_BL.any() and not masked.weight_BL.any()


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_rank_in_group_equals_sorting_by_loops(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    length = sum(sizes)
    score_L: Tensor = torch.randint(4, (length,), generator=generator).double()  # ties: the earlier token is first
    maskable_L = torch.rand(length, generator=generator) < 0.7
    starts = [sum(sizes[:n]) for n in range(len(sizes)) for _ in range(sizes[n])]

    def sort_key(i: int):
        return not maskable_L[i].item(), -score_L[i].item() if maskable_L[i] else 0.0, i

    expected = [
        sorted((k for k in range(length) if starts[k] == starts[i]), key=sort_key).index(i) for i in range(length)
    ]
    rank_L = rank_in_group(score_L[None], maskable_L[None], torch.tensor([starts]))[0]
    assert rank_L.tolist() == expected


# Settings


def test_masking_and_weight_go_together_or_are_refused():
    maskings, weights = {masking for masking, _ in PAIRS}, {weight for _, weight in PAIRS}
    for masking, weight in product(maskings, weights):
        if (masking, weight) in PAIRS:
            Noise(masking, weight)
        else:
            with pytest.raises(ValueError, match=rf"noise.weight: {weight} .* noise.masking: {masking}"):
                Noise(masking, weight)


@pytest.mark.parametrize("options", [{"half_life": 0.0}, {"half_life": -1.0}, {"eps": -0.1}, {"eps": 1.0}])
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"noise.{next(iter(options))}"):
        Noise(**options)
