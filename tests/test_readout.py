"""The head against plain cross-entropy: values, gradients under weights, and how many logits ever exist."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dlm_lightning import bfloat16, readout
from dlm_lightning.rehearsal import Ledger
from dlm_lightning.view import Pattern

by_family = pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "cohere", "granite"])
by_tied = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
by_chunk = pytest.mark.parametrize("chunk", [1, 4, 1000])


def shown(make_batch, denoiser):
    """A view with packed, continued and padded documents; the flat indices of its masked tokens, and what they are."""
    batch = make_batch([[7, 4], [10]], length=12, starts={(1, 0): 37})
    view = Pattern(3, "clean").lay_out(batch, [batch.maskable_BL & (batch.u_BL < 0.6)], denoiser.mask_id)
    keep_N = (view.ids_BS == denoiser.mask_id).flatten().nonzero().squeeze(1)
    return view, keep_N, batch.ids_BL.repeat(1, 2).flatten()[keep_N]


def at_a_time(monkeypatch, denoiser, chunk: int) -> None:
    monkeypatch.setitem(readout.AT_A_TIME, "cpu", chunk * denoiser.network.config.vocab_size)


def gradients(loss, denoiser):
    return torch.autograd.grad(3 * loss, [p for p in denoiser.parameters() if p.requires_grad])


def assert_close(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


@by_family
@by_tied
@by_chunk
def test_it_is_cross_entropy_under_weights(make_batch, make_denoiser, monkeypatch, family, tied, chunk):
    denoiser = make_denoiser(family, tied)
    view, keep_N, target_N = shown(make_batch, denoiser)
    weight_N = 10 ** torch.randn(len(keep_N))
    expected_N = F.cross_entropy(denoiser(view, keep_N), target_N, reduction="none")
    expected = gradients((expected_N * weight_N).sum(), denoiser)
    at_a_time(monkeypatch, denoiser, chunk)
    nll_N = denoiser(view, keep_N, target_N)
    assert torch.allclose(nll_N, expected_N, rtol=1e-5)
    assert_close(gradients((nll_N * weight_N).sum(), denoiser), expected)
    loss, nll_N = denoiser(view, keep_N, target_N, weight_N)
    assert torch.allclose(nll_N, expected_N, rtol=1e-5) and not nll_N.requires_grad
    assert torch.allclose(loss, (expected_N * weight_N).sum(), rtol=1e-5)
    assert_close(gradients(loss, denoiser), expected)


@by_tied
def test_a_frozen_head_gets_no_gradient_and_hidden_states_do(make_batch, make_denoiser, tied):
    denoiser = make_denoiser("qwen3", tied)
    view, keep_N, target_N = shown(make_batch, denoiser)
    weight_N = torch.rand(len(keep_N))
    denoiser.network.get_output_embeddings().weight.requires_grad_(False)
    expected = gradients(
        (F.cross_entropy(denoiser(view, keep_N), target_N, reduction="none") * weight_N).sum(), denoiser
    )
    assert_close(gradients(denoiser(view, keep_N, target_N, weight_N)[0], denoiser), expected)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_logits_of_a_chunk_are_the_most_that_ever_exist_and_are_computed_once(
    make_batch, make_denoiser, products, monkeypatch, family
):
    denoiser = make_denoiser(family)
    view, keep_N, target_N = shown(make_batch, denoiser)
    at_a_time(monkeypatch, denoiser, 4)
    chunks = [4] * (len(keep_N) // 4) + [len(keep_N) % 4] * (len(keep_N) % 4 > 0)
    with products(301) as made:
        denoiser(view, keep_N, target_N, torch.ones(len(keep_N)))[0].backward()
    assert [len(x) for x in made.found] == chunks
    with products(301) as made:
        denoiser(view, keep_N, target_N).sum().backward()
    assert sorted(len(x) for x in made.found) == sorted(chunks * 2)  # once more each in the backward pass


@pytest.mark.parametrize(("size", "scale"), [(50, 1e-3), (50, 1.0), (50, 100.0), (151_936, 5.0)])
def test_sure_and_hopeless_predictions_keep_their_digits(size, scale):
    """−log p where p is too small for float32, and where it is close to 1; of large vocabularies a digit less."""
    logits_NV = scale * torch.randn(8, size)
    logits_NV[:, 49] = -torch.inf
    target_N = torch.where(torch.arange(8) % 2 == 0, logits_NV.argmax(1), torch.arange(8) % 49)
    double_NV = logits_NV.double().requires_grad_()
    expected_N = F.cross_entropy(double_NV, target_N, reduction="none")
    (slope_NV,) = torch.autograd.grad(expected_N.sum(), double_NV)
    near = {"rtol": 1e-5 if size < 1000 else 1e-4, "atol": 2e-7}
    assert torch.allclose(readout._slope(logits_NV, target_N).double(), expected_N, **near)
    assert torch.allclose(logits_NV.double(), slope_NV, **near)


def test_of_half_precision_are_the_products_alone():
    """Not what lies between them, nor the sum over a hundred chunks, to which each adds as much."""
    hidden_ND, head_VD = 1 + 0.1 * torch.randn(400, 32), 0.1 * torch.randn(301, 32)
    target_N, weight_N, banned_X = torch.full((400,), 5), torch.full((400,), 1.5), torch.tensor([300])
    half = hidden_ND.bfloat16(), head_VD.bfloat16()
    nll_N, *grads = readout._by_products(*half, target_N, weight_N, banned_X, True, 4)
    double = [x.double().requires_grad_() for x in half]
    logits_NV = (double[0] @ double[1].t()).index_fill(1, banned_X, -torch.inf)
    expected_N = F.cross_entropy(logits_NV, target_N, reduction="none")
    assert (nll_N - expected_N).norm() < 1e-4 * expected_N.norm()
    for mine, theirs in zip(grads, torch.autograd.grad((expected_N * weight_N).sum(), double), strict=True):
        assert (mine - theirs).norm() < 3e-3 * theirs.norm()


def test_a_frozen_head_takes_no_memory_for_its_gradient():
    tokens = torch.arange(6), torch.ones(6), torch.tensor([4000])
    peaks = []
    for trained in (True, False):
        with Ledger() as ledger:
            readout._by_products(torch.randn(6, 64), torch.randn(4001, 64), *tokens, trained, 2)
        peaks.append(sum(ledger.fullest))
    assert peaks[0] - peaks[1] >= 4 * 4001 * 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_networks_of_other_dtypes_are_read(make_denoiser, monkeypatch, dtype):
    monkeypatch.setattr(bfloat16, "in_hardware", lambda _device: True)
    network = make_denoiser().network
    hidden_ND, banned_X = torch.randn(3, 32), torch.tensor([300])
    expected_NV = readout.logits(network, hidden_ND, banned_X)
    assert torch.allclose(readout.logits(network.to(dtype), hidden_ND.to(dtype), banned_X), expected_NV, atol=2e-3)


def test_a_head_with_a_hook_is_called(make_batch, make_denoiser):
    denoiser, called = make_denoiser(), []
    denoiser.network.get_output_embeddings().register_forward_hook(lambda *_: called.append(1))
    view, keep_N, target_N = shown(make_batch, denoiser)
    denoiser(view, keep_N, target_N, torch.ones(len(keep_N)))
    assert called


def test_a_compiler_goes_around_it(make_denoiser):
    network, hidden_ND, target_N = make_denoiser().network, torch.randn(3, 32, requires_grad=True), torch.arange(3)

    def loss(hidden_ND):
        return readout.weighted_nll(network, 2 * hidden_ND, target_N, torch.ones(3), target_N[:0])[0]

    mine, expected = (
        torch.autograd.grad(f(hidden_ND), hidden_ND)[0] for f in (torch.compile(loss, backend="eager"), loss)
    )
    assert torch.equal(mine, expected)


def test_its_gradient_is_there_once(make_batch, make_denoiser):
    denoiser = make_denoiser()
    view, keep_N, target_N = shown(make_batch, denoiser)
    loss, _ = denoiser(view, keep_N, target_N, torch.ones(len(keep_N)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_without_gradients_it_is_the_same_sum(make_batch, make_denoiser):
    denoiser = make_denoiser()
    view, keep_N, target_N = shown(make_batch, denoiser)
    weight_N = torch.rand(len(keep_N))
    with torch.no_grad():
        loss, nll_N = denoiser(view, keep_N, target_N, weight_N)
    assert torch.allclose(loss, denoiser(view, keep_N, target_N, weight_N)[0])
    assert torch.allclose(nll_N, denoiser(view, keep_N, target_N))


@pytest.mark.parametrize("hardware", [False, True])
def test_under_autocast(make_batch, make_denoiser, monkeypatch, hardware):
    """bfloat16 where the device has it, float32 where it would only imitate it; several chunks share one cast."""
    denoiser = make_denoiser()
    view, keep_N, target_N = shown(make_batch, denoiser)
    weight_N = torch.rand(len(keep_N))
    monkeypatch.setattr(bfloat16, "in_hardware", lambda _device: hardware)
    at_a_time(monkeypatch, denoiser, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients((denoiser(view, keep_N, target_N) * weight_N).sum(), denoiser)
    with torch.autocast("cpu", torch.bfloat16):
        mine = gradients(denoiser(view, keep_N, target_N, weight_N)[0], denoiser)
        assert denoiser(view, keep_N).dtype == torch.float32
    for a, b in zip(mine, expected, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()


def test_where_bfloat16_is_imitated_autocast_changes_nothing(make_denoiser, monkeypatch):
    monkeypatch.setattr(bfloat16, "in_hardware", lambda _device: False)
    network = make_denoiser(tied=False).network
    hidden_ND, target_N = torch.randn(9, 32, requires_grad=True), torch.arange(9)
    found = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = readout.weighted_nll(network, hidden_ND, target_N, torch.full((9,), 0.3), target_N[:0])
        found.append([loss, *torch.autograd.grad(loss, [hidden_ND, network.get_output_embeddings().weight])])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def layers_of(denoiser):
    return denoiser.network.base_model.layers


@by_family
@pytest.mark.parametrize("shift", ["none", "next_token"])
def test_what_nobody_reads_needs_no_feed_forward(make_batch, make_denoiser, monkeypatch, family, shift):
    """Under shift, two noisy copies read the same clean token for the first of a block."""
    denoiser = make_denoiser(family, shift=shift)
    batch = make_batch([[7, 4], [10]], length=12, starts={(1, 0): 37})
    masks = [batch.maskable_BL & (batch.u_BL < share) for share in (0.6, 0.9)]
    view = Pattern(3, "clean").lay_out(batch, masks, denoiser.mask_id)
    keep_N = (view.ids_BS == denoiser.mask_id).flatten().nonzero().squeeze(1)
    target_N, weight_N = batch.ids_BL.repeat(1, 3).flatten()[keep_N], torch.rand(len(keep_N))
    rows = []
    for layer in layers_of(denoiser):
        layer.mlp.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    found = {}
    for mostly in (0.0, 1.0):
        monkeypatch.setattr(readout, "MOSTLY", mostly)
        loss, nll_N = denoiser(view, keep_N, target_N, weight_N)
        found[mostly] = (nll_N, gradients(loss, denoiser))
    tokens = view.ids_BS.numel()
    assert rows == [tokens] * len(rows[:-1]) + [len(keep_N)] and len(keep_N) < tokens
    assert torch.allclose(found[0.0][0], found[1.0][0], atol=1e-5)
    assert_close(found[1.0][1], found[0.0][1])


@pytest.mark.parametrize("anew", [False, True])
def test_a_layer_that_computes_its_activations_anew_has_all_tokens(make_batch, make_denoiser, anew):
    denoiser = make_denoiser().train()
    if anew:
        denoiser.network.gradient_checkpointing_enable({"use_reentrant": False})
    view, keep_N, target_N = shown(make_batch, denoiser)
    rows = []
    layers_of(denoiser)[-1].mlp.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    denoiser(view, keep_N, target_N, torch.ones(len(keep_N)))[0].backward()
    assert rows == [view.ids_BS.numel() if anew else len(keep_N)]


def test_who_asks_for_no_token_sees_the_states_of_all(make_batch, make_denoiser):
    denoiser = make_denoiser()
    view, keep_N, _ = shown(make_batch, denoiser)
    states = []
    layers_of(denoiser)[-1].register_forward_hook(lambda _, __, out: states.append(out))
    with torch.no_grad():
        denoiser(view, keep_N[:0])
        denoiser(view, torch.arange(view.ids_BS.numel()))
    assert torch.equal(*states)
