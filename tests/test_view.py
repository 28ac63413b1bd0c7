"""Views, patterns and the predicate, against masks written with loops from the papers' definitions."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlm_lightning.view import AUTOREGRESSIVE, Pattern, View, attention_mask, groups, predictors, sees

MASK = 300
PATTERNS = {
    "clean": Pattern(3, "clean"),
    "clean, causal rank": Pattern(3, "clean", "causal"),
    "noisy": Pattern(3, "noisy"),
    "full": Pattern(None),
    "autoregressive": AUTOREGRESSIVE,
}
by_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())


def continuation(pattern: Pattern, ids_BL: Tensor, start: int) -> View:
    """Documents of which the block at `start` is being denoised."""
    return pattern.continuation(
        ids_BL, torch.arange(ids_BL.shape[1]).expand_as(ids_BL), torch.full_like(ids_BL[:, :1], start)
    )


@st.composite
def rows(draw):
    """One row as (document lengths, their first positions, row length): packed, ragged at both ends, padded."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=0, max_size=3))
    starts = {(0, d): draw(st.sampled_from([0, 0, 3, 37])) for d in range(len(lengths))}
    return lengths, starts, max(1, sum(lengths) + draw(st.integers(0, 3)))


def pairs(size: int, allowed) -> Tensor:
    return torch.tensor([[bool(allowed(q, k)) for k in range(size)] for q in range(size)])


def published(position: list[int], document: list[int], block: int) -> Tensor:
    """M_BD | M_OBC | M_BC of BD3-LM for [noisy; clean], where different documents never meet."""
    n = len(position)

    def allowed(q: int, k: int) -> bool:
        if document[q % n] != document[k % n]:
            return False
        block_q, block_k = position[q % n] // block, position[k % n] // block
        q_clean, k_clean = q >= n, k >= n
        block_diagonal = block_q == block_k and q_clean == k_clean
        offset_block_causal = block_q > block_k and not q_clean and k_clean
        block_causal = block_q >= block_k and q_clean and k_clean
        return block_diagonal or offset_block_causal or block_causal

    return pairs(2 * n, allowed)


def laid_out(make_batch, row, pattern: Pattern, copies: int, **options):
    lengths, starts, length = row
    batch = make_batch([lengths], length, starts=starts)
    view = pattern.lay_out(batch, [batch.maskable_BL] * copies, MASK, **options)
    return attention_mask(view)[0], batch.position_BL[0].tolist(), batch.document_BL[0].tolist()


@given(row=rows(), block=st.integers(1, 5))
def test_clean_context_is_the_published_mask(make_batch, row, block):
    mask, position, document = laid_out(make_batch, row, Pattern(block, "clean"), 1)
    assert torch.equal(mask, published(position, document, block))


def test_published_mask_of_two_blocks_drawn_by_hand(make_batch):
    batch = make_batch([[4]])
    drawn = """
        11......
        11......
        ..1111..
        ..1111..
        ....11..
        ....11..
        ....1111
        ....1111
    """
    expected = torch.tensor([[c == "1" for c in line] for line in drawn.split()])
    assert torch.equal(attention_mask(Pattern(2, "clean").lay_out(batch, [batch.maskable_BL], MASK))[0], expected)


@given(row=rows(), block=st.integers(1, 5))
def test_complementary_copies_are_two_published_masks_glued(make_batch, row, block):
    mask, position, document = laid_out(make_batch, row, Pattern(block, "clean"), 2)
    n = len(position)
    two = published(position, document, block)
    expected = torch.zeros(3 * n, 3 * n, dtype=torch.bool)
    for copy in (0, 1):
        own, clean = slice(copy * n, (copy + 1) * n), slice(2 * n, 3 * n)
        expected[own, own], expected[own, clean] = two[:n, :n], two[:n, n:]
        expected[clean, clean] = two[n:, n:]
    assert torch.equal(mask, expected)


@given(row=rows(), block=st.integers(1, 5))
def test_causal_context_rank_makes_the_clean_half_causal_and_nothing_else(make_batch, row, block):
    mask, position, document = laid_out(make_batch, row, Pattern(block, "clean", "causal"), 1)
    n = len(position)
    expected = published(position, document, block)
    expected[n:, n:] = pairs(n, lambda q, k: document[q] == document[k] and k <= q)
    assert torch.equal(mask, expected)


@given(row=rows(), block=st.integers(1, 5))
def test_patterns_of_one_copy(make_batch, row, block):
    noisy, position, document = laid_out(make_batch, row, Pattern(block), 1)
    size = len(position)

    def same(q, k):
        return document[q] == document[k]

    assert torch.equal(noisy, pairs(size, lambda q, k: same(q, k) and position[q] // block >= position[k] // block))
    full, _, _ = laid_out(make_batch, row, Pattern(None), 1)
    assert torch.equal(full, pairs(size, same))
    autoregressive, _, _ = laid_out(make_batch, row, AUTOREGRESSIVE, 0)
    assert torch.equal(autoregressive, pairs(size, lambda q, k: same(q, k) and k <= q))


@by_pattern
def test_padding_sees_only_itself_and_nobody_sees_it(make_batch, pattern):
    batch = make_batch([[4, 3], []], length=10)
    mask = attention_mask(pattern.lay_out(batch, [batch.maskable_BL], MASK))
    copies = mask.shape[1] // 10
    padding = (batch.document_BL < 0).repeat(1, copies)
    assert padding.sum() == copies * (3 + 10)
    diagonal = torch.eye(10 * copies, dtype=torch.bool)
    for b in range(2):
        assert torch.equal(mask[b][padding[b]], diagonal[padding[b]])
        assert torch.equal(mask[b][:, padding[b]], diagonal[:, padding[b]])


@by_pattern
@pytest.mark.parametrize("size", [1, 6, 8])
def test_decoding_sees_the_rows_of_the_training_mask(make_batch, pattern, size):
    batch = make_batch([[size]])
    train = attention_mask(pattern.lay_out(batch, [batch.maskable_BL], MASK))[0]
    context = train.shape[0] - size  # where the tokens of earlier blocks lie in the training view
    block = pattern.block_size or size
    for start in range(0, size, block):
        end = min(start + block, size)
        decode = attention_mask(continuation(pattern, batch.ids_BL[:, :end], start))[0]
        rows_of = [context + i if i < start else i for i in range(end)]
        assert torch.equal(decode, train[rows_of][:, rows_of])
        others = [i for i in range(train.shape[0]) if i not in rows_of]
        assert not train[rows_of][:, others].any()


def test_a_prompt_that_half_fills_a_block_is_seen_by_the_rest_of_it():
    for pattern in PATTERNS.values():
        mask = attention_mask(continuation(pattern, torch.arange(6)[None], 3))[0]
        assert mask[5, :].all()


@given(row=rows(), block=st.sampled_from([None, 2, 3]))
def test_ar_copy_is_causal_and_leaves_the_noisy_copy_alone(make_batch, row, block):
    mask, _, document = laid_out(make_batch, row, Pattern(block), 1, with_ar_copy=True)
    alone, _, _ = laid_out(make_batch, row, Pattern(block), 1)
    n = len(document)
    assert torch.equal(mask[:n, :n], alone)
    assert torch.equal(mask[n:, n:], pairs(n, lambda q, k: document[q] == document[k] and k <= q))
    assert not mask[:n, n:].any() and not mask[n:, :n].any()


def test_order_makes_a_block_causal():
    zero = torch.zeros(1, 4, dtype=torch.long)
    index = torch.arange(4)[None]
    view = View(zero, index, zero, index, zero, zero)
    assert torch.equal(attention_mask(view)[0], torch.ones(4, 4).tril().bool())


@given(row=rows(), block=st.integers(1, 4))
def test_a_view_that_states_its_structure_has_it(make_batch, row, block):
    lengths, starts, length = row
    batch = make_batch([lengths], length, starts=starts)
    document = batch.document_BL[0].tolist()
    stated = set()
    for pattern in (Pattern(None), Pattern(block), Pattern(block, "clean"), AUTOREGRESSIVE):
        for copies, with_ar_copy in product((0, 1), (False, True)):
            view = pattern.lay_out(batch, [batch.maskable_BL] * copies, MASK, with_ar_copy)
            if view.structure is not None:
                stated.add(view.structure)
                later = view.structure == "full"
                runs = pairs(length, lambda q, k, later=later: document[q] == document[k] and (later or k <= q))
                assert torch.equal(attention_mask(view)[0], runs)
    assert stated == {"full", "causal"}


@pytest.mark.parametrize("shift", ["none", "next_token"])
@pytest.mark.parametrize("first_token", ["clean", "noisy"])
@settings(max_examples=40)
@given(row=rows(), block=st.sampled_from([None, 1, 2, 3]), copies=st.integers(0, 2), seed=st.integers(0, 99))
def test_predictors_equal_a_search_by_loops(make_batch, shift, first_token, row, block, copies, seed):
    lengths, starts, length = row
    batch = make_batch([lengths], length, starts=starts, seed=seed)
    clean = block is not None and copies > 0
    pattern = Pattern(block, "clean" if clean else "noisy")
    masks = [batch.maskable_BL & (torch.rand(1, length) < 0.5) for _ in range(copies if clean else min(copies, 1))]
    view = pattern.lay_out(batch, masks, MASK)
    ids, position, document = (x[0].tolist() for x in (view.ids_BS, view.position_BS, view.document_BS))
    copy_of = [*(n + 1 for n in range(copies) for _ in range(length)), *[0] * length] if clean else [0] * length

    def predictor(s: int) -> int:
        if ids[s] == MASK and shift == "none":
            return s
        opens_a_block = position[s] % block == 0 if block else position[s] == 0
        copy = 0 if first_token == "clean" and opens_a_block else copy_of[s]
        wanted = (document[s], position[s] - 1, copy)
        found = [k for k in range(len(ids)) if (document[k], position[k], copy_of[k]) == wanted]
        assert len(found) <= 1
        return found[0] if found else -1

    assert predictors(view, MASK, shift, first_token)[0].tolist() == [predictor(s) for s in range(len(ids))]


def test_predictors_of_two_blocks_by_hand(make_batch):
    batch = make_batch([[4]])
    masked = torch.tensor([[False, True, True, True]])
    view = Pattern(2, "clean").lay_out(batch, [masked], MASK)
    #                                                            noisy 0–3      clean 4–7
    assert predictors(view, MASK, "next_token")[0].tolist() == [-1, 0, 5, 2, -1, 4, 5, 6]
    assert predictors(view, MASK, "next_token", "noisy")[0].tolist() == [-1, 0, 1, 2, -1, 4, 5, 6]
    assert predictors(view, MASK, "none")[0].tolist() == [-1, 1, 2, 3, -1, 4, 5, 6]


@by_pattern
@pytest.mark.parametrize("first_token", ["clean", "noisy"])
def test_while_decoding_each_masked_token_of_a_block_has_a_predictor(pattern, first_token):
    ids = torch.tensor([[7, 8, 9, MASK, MASK, MASK]])
    view = continuation(pattern, ids, 3)
    assert predictors(view, MASK, "none", first_token)[0, 3:].tolist() == [3, 4, 5]
    assert predictors(view, MASK, "next_token", first_token)[0, 3:].tolist() == [2, 3, 4]


@given(row=rows(), block=st.sampled_from([None, 1, 2, 4]))
def test_groups_equal_loops(make_batch, row, block):
    lengths, starts, length = row
    batch = make_batch([lengths], length, starts=starts)
    position, document = batch.position_BL[0].tolist(), batch.document_BL[0].tolist()

    def name(i):
        return document[i], position[i] // block if block else 0

    expected = [min(k for k in range(length) if name(k) == name(i)) for i in range(length)]
    assert groups(batch.position_BL, batch.document_BL, block)[0].tolist() == expected


def test_copies_show_the_mask_where_told_and_share_positions(make_batch):
    batch = make_batch([[5, 4]], length=11, starts={(0, 0): 37})
    first = batch.maskable_BL & (batch.u_BL < 0.5)
    second = batch.maskable_BL & ~first
    assert first.any() and second.any()
    view = Pattern(4, "clean").lay_out(batch, [first, second], MASK)
    copies = view.ids_BS.view(3, 11)
    assert torch.equal(copies == MASK, torch.cat([first, second, torch.zeros_like(first)]))
    assert torch.equal(copies[2:], batch.ids_BL)
    assert torch.equal(torch.where(copies == MASK, batch.ids_BL, copies), batch.ids_BL.expand(3, 11))
    assert torch.equal(view.position_BS.view(3, 11), batch.position_BL.expand(3, 11))


def test_sees_broadcasts_like_any_function_of_two_tokens(make_batch):
    view = Pattern(2, "clean").lay_out(batch := make_batch([[4, 3]]), [batch.maskable_BL], MASK)
    mask = attention_mask(view)
    for q, k in product(range(14), repeat=2):
        assert sees(view[:, q], view[:, k]).item() == mask[0, q, k]


def test_wrong_patterns_are_refused(make_batch):
    with pytest.raises(ValueError, match="block_size"):
        Pattern(0)
    with pytest.raises(ValueError, match="block_size"):
        Pattern(None, "clean")
    batch = make_batch([[4]])
    with pytest.raises(ValueError, match="context: clean"):
        Pattern(2, "noisy").lay_out(batch, [batch.maskable_BL] * 2, MASK)
