"""The loss and the arithmetic that pins the method: likelihoods by the chain rule, and what it must not depend on."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import pytest
import torch
from transformers import AutoModelForCausalLM

from dlm_lightning.loss import score, weighted_sum
from dlm_lightning.noise import NELBO, Masked, Noise
from dlm_lightning.view import AUTOREGRESSIVE, Batch, Pattern, groups

MASK = 300
ARMS = {  # pattern, noisy copies, shift, weight of the AR loss
    "full": (Pattern(None), 1, "next_token", 0.0),
    "full, AR": (Pattern(None), 1, "next_token", 0.5),
    "clean": (Pattern(4, "clean"), 1, "none", 0.0),
    "clean, causal rank, AR": (Pattern(4, "clean", "causal"), 1, "none", 0.5),
    "noisy": (Pattern(4), 1, "none", 0.0),
    "noisy, AR": (Pattern(4), 1, "none", 0.5),
    "complementary": (Pattern(4, "clean"), 2, "next_token", 0.0),
    "autoregressive": (AUTOREGRESSIVE, 0, "next_token", 1.0),
}
by_arm = pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS.keys())


def corrupt(batch: Batch, pattern: Pattern, copies: int, noise: Noise = NELBO) -> list[Masked]:
    """One mask per copy; the second holds what the first leaves."""
    spans = [groups(batch.position_BL, batch.document_BL, size) for size in (pattern.block_size, None)]
    first = noise.draw(batch.u_BL, batch.t_BL, batch.maskable_BL, *spans)
    rest_BL = batch.maskable_BL & ~first.mask_BL
    return [first, Masked(rest_BL, rest_BL.float())][:copies]


def everything(batch: Batch) -> list[Masked]:
    return [Masked(batch.maskable_BL, batch.maskable_BL.float())]


def nll_of(denoiser, batch, view, copies, ar_weight=0.0):
    scored = score(batch, view, copies, ar_weight)
    with torch.no_grad():
        return denoiser(view, scored.index_N, scored.target_N), scored


# Which tokens are scored


def test_scored_tokens_by_hand(make_batch):
    batch = make_batch([[3], [2]], length=3)
    first = torch.tensor([[0, 2.0, 0], [0, 0, 0]])
    second = torch.tensor([[0, 0, 3.0], [0, 4.0, 0]])
    copies = [Masked(first > 0, first), Masked(second > 0, second)]
    ids = batch.ids_BL.tolist()
    view = Pattern(2, "clean").lay_out(batch, [first > 0, second > 0], MASK)
    scored = score(batch, view, copies)
    assert scored.index_N.tolist() == [1, 5, 9 + 4]
    assert scored.target_N.tolist() == [ids[0][1], ids[0][2], ids[1][1]]
    assert scored.weight_N.tolist() == [2, 3, 4]
    with_ar = score(batch, view, copies, ar_weight=0.5)
    assert with_ar.index_N.tolist() == [1, 5, 7, 8, 9 + 4, 9 + 7]
    assert with_ar.target_N.tolist() == [ids[0][1], ids[0][2], ids[0][1], ids[0][2], ids[1][1], ids[1][1]]
    assert with_ar.weight_N.tolist() == [2, 3, 0.5, 0.5, 4, 0.5]


def test_without_a_noisy_copy_each_maskable_token_is_scored(make_batch):
    batch = make_batch([[4, 3]], length=9, prompts={(0, 0): 2})
    scored = score(batch, AUTOREGRESSIVE.lay_out(batch, [], MASK), [], ar_weight=1.0)
    assert scored.index_N.tolist() == [2, 3, 5, 6]
    assert torch.equal(scored.target_N, batch.ids_BL[0, scored.index_N])


def test_the_loss_is_a_sum():
    assert weighted_sum(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([3.0, 0.5])).item() == 4
    assert weighted_sum(torch.empty(0), torch.empty(0)).item() == 0


# Likelihoods


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("pattern", [Pattern(1, "clean"), Pattern(1, "clean", "causal")], ids=["block", "causal"])
def test_shift_and_block_size_1_give_the_sources_own_likelihood(
    make_batch, make_denoiser, source_folder, family, pattern
):
    network = AutoModelForCausalLM.from_pretrained(source_folder(family))
    batch = make_batch([[12]])
    loss = network(input_ids=batch.ids_BL, labels=batch.ids_BL).loss.item()
    denoiser = make_denoiser(family, shift="next_token")
    copies = corrupt(batch, pattern, 1)
    view = pattern.lay_out(batch, [copies[0].mask_BL], MASK)
    nll_N, scored = nll_of(denoiser, batch, view, copies)
    assert weighted_sum(nll_N, scored.weight_N).item() / 11 == pytest.approx(loss, rel=1e-6)
    ar_nll_N, _ = nll_of(denoiser, batch, AUTOREGRESSIVE.lay_out(batch, [], MASK), [], ar_weight=1.0)
    assert ar_nll_N.mean().item() == pytest.approx(loss, rel=1e-6)
    assert torch.allclose(nll_N, ar_nll_N, rtol=1e-5)


def test_block_size_1_without_shift_is_its_own_chain_rule(make_batch, make_denoiser, plain_logits):
    denoiser = make_denoiser(shift="none")
    batch = make_batch([[9]])
    ids = batch.ids_BL[0].tolist()
    view = Pattern(1, "clean").lay_out(batch, [batch.maskable_BL], MASK)
    nll_N, _ = nll_of(denoiser, batch, view, everything(batch))
    for i in range(1, 9):
        shown = torch.tensor([*ids[:i], MASK])
        logits = plain_logits(denoiser, shown, torch.arange(i + 1), torch.ones(i + 1, i + 1).tril().bool())
        assert nll_N[i - 1].item() == pytest.approx(-logits[-1, :300].log_softmax(0)[ids[i]].item(), rel=1e-4)


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("shift", ["none", "next_token"])
def test_nelbo_over_all_masks_is_the_mean_likelihood_over_all_orders(
    make_batch, make_denoiser, plain_logits, size, shift
):
    denoiser = make_denoiser(shift=shift)
    block = range(size, 2 * size)
    masks = [mask for k in range(1, size + 1) for mask in combinations(block, k)]
    one = make_batch([[2 * size]])
    batch = Batch(*(x.expand(len(masks), *x.shape[1:]) for x in one))
    mask_BL = torch.tensor([[i in mask for i in range(2 * size)] for mask in masks])
    # k uniform on 1 … L', the mask uniform given k, weight L'/k
    chance_B = torch.tensor([1 / size / math.comb(size, len(mask)) for mask in masks])
    ratio_B = torch.tensor([size / len(mask) for mask in masks])
    copies = [Masked(mask_BL, (chance_B * ratio_B)[:, None] * mask_BL)]
    nll_N, scored = nll_of(denoiser, batch, Pattern(size, "clean").lay_out(batch, [mask_BL], MASK), copies)

    ids = one.ids_BL[0].tolist()
    sees = torch.tensor([[k // size <= q // size for k in range(2 * size)] for q in range(2 * size)])
    conditionals: dict[tuple[int, tuple[int, ...]], float] = {}
    for mask in masks:  # −log p of each hidden token given the others of its block and the block before, one by one
        shown = torch.tensor([MASK if i in mask else token for i, token in enumerate(ids)])
        logits = plain_logits(denoiser, shown, torch.arange(2 * size), sees)[:, :300].log_softmax(1)
        for i in mask:
            conditionals[i, mask] = -logits[i - (shift == "next_token"), ids[i]].item()
    orders = list(permutations(block))
    chain_rules = [sum(conditionals[o[j], tuple(sorted(o[j:]))] for j in range(size)) for o in orders]
    assert max(chain_rules) - min(chain_rules) > 0.1
    assert weighted_sum(nll_N, scored.weight_N).item() == pytest.approx(sum(chain_rules) / len(orders), rel=1e-5)


@pytest.mark.parametrize("arm", [arm for name, arm in ARMS.items() if "AR" in name], ids=lambda arm: str(arm[0]))
def test_an_ar_copy_adds_the_ar_loss_and_changes_nothing_else(make_batch, make_denoiser, source_folder, arm):
    pattern, _, shift, _ = arm
    denoiser = make_denoiser(shift=shift)
    network = AutoModelForCausalLM.from_pretrained(source_folder())
    batch = make_batch([[7, 5], [9]], length=13)
    documents = [batch.ids_BL[0, :7], batch.ids_BL[0, 7:12], batch.ids_BL[1, :9]]
    ar_nll = sum(network(input_ids=d[None], labels=d[None]).loss.item() * (len(d) - 1) for d in documents)
    copies = corrupt(batch, pattern, 1)
    masks = [copies[0].mask_BL]
    alone_N, scored = nll_of(denoiser, batch, pattern.lay_out(batch, masks, MASK), copies)
    both_N, both = nll_of(denoiser, batch, pattern.lay_out(batch, masks, MASK, with_ar_copy=True), copies, 0.25)
    loss = weighted_sum(alone_N, scored.weight_N).item()
    assert weighted_sum(both_N, both.weight_N).item() == pytest.approx(loss + 0.25 * ar_nll, rel=1e-5)
    noisy_N = both.index_N % 26 < 13  # a row is [noisy; clean]
    assert torch.allclose(both_N[noisy_N], alone_N, rtol=1e-5)
    assert both_N[~noisy_N].sum().item() == pytest.approx(ar_nll, rel=1e-5)


# What the loss does not depend on


def padded(batch: Batch, columns: int, rows: int) -> Batch:
    """More padding at the end of each row, and rows of padding: with other tokens and other noise."""
    B, L = batch.ids_BL.shape[0] + rows, batch.ids_BL.shape[1] + columns
    blank = Batch(
        torch.randint(300, (B, L)),
        torch.zeros(B, L, dtype=torch.long),
        (-1 - torch.arange(L)).repeat(B, 1),
        torch.zeros(B, L, dtype=torch.bool),
        torch.rand(B, L),
        1 - torch.rand(B, L),
        -torch.ones(B, dtype=torch.long),
    )
    for theirs, mine in zip(blank, batch, strict=True):
        theirs[tuple(slice(n) for n in mine.shape)] = mine
    return blank


def unpacked(batch: Batch) -> Batch:
    """Each document in a row of its own."""
    parts = []
    for b, row in enumerate(batch.document_BL):
        for document in row[row >= 0].unique():
            here = (row == document).nonzero().squeeze(1)
            one = Batch(*(x[b : b + 1, here] for x in batch[:6]), batch.place_B[b : b + 1])
            parts.append(padded(one._replace(document_BL=one.document_BL * 0), len(row) - len(here), 0))
    return Batch(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def rows_of(batch: Batch, rows: slice) -> Batch:
    return Batch(*(x[rows] for x in batch))


@pytest.fixture
def step(make_denoiser, loss_and_gradients):
    """A training step of an arm on a batch: loss and gradients."""

    def run(arm, batch: Batch):
        pattern, copies, shift, ar_weight = arm
        denoiser = make_denoiser("qwen3", True, shift=shift)
        return loss_and_gradients(denoiser, batch, corrupt(batch, pattern, copies), pattern, ar_weight)

    return run


@pytest.fixture
def ragged(make_batch) -> Batch:
    """Packed, continued, prompted and padded documents."""
    return make_batch([[6, 5], [9], [3, 1, 6], [11]], length=11, prompts={(0, 1): 2}, starts={(1, 0): 37})


@by_arm
def test_loss_and_gradients_do_not_depend_on_padding(step, assert_same, ragged, arm):
    assert_same(step(arm, padded(ragged, columns=5, rows=2)), step(arm, ragged))


@by_arm
def test_micro_batches_add_up(step, assert_same, ragged, arm):
    (first, gradients), (second, more) = (step(arm, rows_of(ragged, rows)) for rows in (slice(1), slice(1, None)))
    assert_same((first + second, {name: g + more[name] for name, g in gradients.items()}), step(arm, ragged))


@by_arm
def test_packed_documents_are_like_separate_rows(step, assert_same, ragged, arm):
    apart = unpacked(ragged)
    assert len(apart.ids_BL) == 7
    assert_same(step(arm, apart), step(arm, ragged))


@by_arm
def test_prompts_are_read_but_not_scored(make_batch, make_denoiser, arm):
    pattern, copies, shift, ar_weight = arm
    denoiser = make_denoiser(shift=shift)
    batch = make_batch([[10]], prompts={(0, 0): 6})
    other = batch._replace(ids_BL=torch.where(torch.arange(10) == 2, (batch.ids_BL + 1) % 300, batch.ids_BL))
    results = []
    for b in (batch, other):
        masked = corrupt(b, pattern, copies)
        view = pattern.lay_out(b, [mask_BL for mask_BL, _ in masked], MASK, with_ar_copy=ar_weight > 0)
        nll_N, scored = nll_of(denoiser, b, view, masked, ar_weight)
        assert (scored.index_N % 10 >= 6).all()
        results.append(nll_N)
    assert (results[0] != results[1]).any()
