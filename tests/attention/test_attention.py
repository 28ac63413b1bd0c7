"""Attention backends against a softmax written with loops, and their refusals."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay

from dlm_lightning import attention
from dlm_lightning.attention import dense, flash, split
from dlm_lightning.loss import score
from dlm_lightning.view import AUTOREGRESSIVE, Pattern, attention_mask, sees

MASK = 300


def naive(q_BHSD, k_BGSD, v_BGSD, mask_BSS: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """[B, S, H, D]: softmax over the keys each query sees, query by query and head by head."""
    B, H, S, _ = q_BHSD.shape
    share = H // k_BGSD.shape[1]
    rows = []
    for b in range(B):
        for s in range(S):
            seen = mask_BSS[b, s].nonzero().squeeze(1)
            for h in range(H):
                k_KD, v_KD = k_BGSD[b, h // share, seen], v_BGSD[b, h // share, seen]
                score_K = scaling * k_KD @ q_BHSD[b, h, s]
                weights_K = torch.exp(softcap * torch.tanh(score_K / softcap) if softcap else score_K)
                rows.append(weights_K / weights_K.sum() @ v_KD)
    return torch.stack(rows).view(B, S, H, -1)


def qkv(view, heads: int, kv_heads: int, dtype=torch.float64) -> list[Tensor]:
    B, S = view.ids_BS.shape
    return [torch.randn(B, n, S, 8, dtype=dtype, requires_grad=True) for n in (heads, kv_heads, kv_heads)]


def packed(make_batch):
    return make_batch([[5, 4], [7], []], length=10, starts={(1, 0): 37})


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("pattern", [Pattern(3, "clean"), Pattern(None), AUTOREGRESSIVE], ids=str)
def test_dense_is_softmax_over_what_is_seen(make_batch, heads, kv_heads, scaling, pattern):
    batch = packed(make_batch)
    view = pattern.lay_out(batch, [batch.maskable_BL], MASK)
    inputs = qkv(view, heads, kv_heads)
    out = attention.attend(nn.Identity(), *inputs, attention_plan=dense.plan(view, sees), scaling=scaling)
    assert out[1] is None
    expected = naive(*inputs, attention_mask(view), scaling or 1 / math.sqrt(8))
    assert torch.allclose(out[0], expected)
    weight = torch.randn_like(expected)
    mine, theirs = (torch.autograd.grad((x * weight).sum(), inputs) for x in (out[0], expected))
    assert all(torch.allclose(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("pattern", [Pattern(3, "clean"), Pattern(None), AUTOREGRESSIVE], ids=str)
def test_a_view_with_keys_before_its_own_attends_as_the_rows_of_the_whole(make_batch, heads, kv_heads, pattern):
    batch = packed(make_batch)
    view = pattern.lay_out(batch, [batch.maskable_BL], MASK)
    q_BHKD, k_BGKD, v_BGKD = qkv(view, heads, kv_heads)
    new = slice(7, None)
    plan = attention.plan(view[:, new], sees, view)
    out_BSHD, _ = attention.attend(nn.Identity(), q_BHKD[:, :, new], k_BGKD, v_BGKD, attention_plan=plan, scaling=0.7)
    assert torch.allclose(out_BSHD, naive(q_BHKD, k_BGKD, v_BGKD, attention_mask(view), 0.7)[:, new])


def test_only_a_view_that_looks_at_itself_is_for_flash(make_batch, monkeypatch):
    monkeypatch.setattr(flash, "plan", lambda *_: "runs")
    view = AUTOREGRESSIVE.lay_out(packed(make_batch), [], MASK)
    there = on_device(view)
    assert attention.plan(there, sees) == attention.plan(there, sees, there) == "runs"
    assert isinstance(attention.plan(view[:, 3:], sees, view), dense.Plan)


def windowed(view, window: int) -> Tensor:
    """Who sees whom through a sliding window, pair by pair."""
    mask_BSS = attention_mask(view).clone()
    for b, q, k in mask_BSS.nonzero().tolist():
        mask_BSS[b, q, k] = abs(view.position_BS[b, q] - view.position_BS[b, k]) < window
    return mask_BSS


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("pattern", [Pattern(3, "clean"), Pattern(None), AUTOREGRESSIVE], ids=str)
def test_layers_may_have_a_window_and_a_softcap_of_their_own(make_batch, pattern, window, softcap):
    batch = packed(make_batch)
    view = pattern.lay_out(batch, [batch.maskable_BL], MASK)
    plan = attention.plan(view, sees)
    inputs = qkv(view, 4, 2)
    for own in (window, 2):  # two layers under one plan
        options = {"sliding_window": own, "softcap": softcap, "scaling": 0.7}
        out, _ = attention.attend(nn.Identity(), *inputs, attention_plan=plan, **options)
        mask_BSS = windowed(view, own) if own else attention_mask(view)
        expected = naive(*inputs, mask_BSS, 0.7, softcap)
        assert torch.allclose(out, expected, atol=1e-6)
        mine, theirs = (torch.autograd.grad((x**2).sum(), inputs) for x in (out, expected))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, theirs, strict=True))


def test_a_causal_window_is_that_of_transformers(make_batch):
    view = AUTOREGRESSIVE.lay_out(make_batch([[12]]), [], MASK)
    overlay = and_masks(sliding_window_overlay(4), causal_mask_function)
    mask_SS = attention_mask(view, window=4)[0]
    index = torch.arange(12)
    assert torch.equal(mask_SS, overlay(0, 0, index[:, None], index))


def test_sinks_which_no_backend_computes_are_refused(make_batch):
    view = AUTOREGRESSIVE.lay_out(packed(make_batch), [], MASK)
    plan = attention.plan(view, sees)
    with pytest.raises(ValueError, match="Identity asks for attention sinks"):
        attention.attend(nn.Identity(), *qkv(view, 4, 2), attention_plan=plan, s_aux=torch.zeros(4))
    attention.attend(nn.Identity(), *qkv(view, 4, 2), attention_plan=plan, s_aux=None)


@pytest.mark.parametrize("view_of", [Pattern(None), AUTOREGRESSIVE, Pattern(3, "clean")], ids=str)
def test_without_a_device_or_the_package_nothing_is_for_flash(make_batch, monkeypatch, view_of):
    batch = packed(make_batch)
    view = view_of.lay_out(batch, [batch.maskable_BL], MASK)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
    monkeypatch.setattr(flash, "kernel", lambda: pytest.fail)  # installed, yet the view is on the CPU
    assert flash.plan(view, sees) is None
    monkeypatch.setattr(flash, "kernel", lambda: None)
    assert flash.plan(on_device(view), sees) is None
    assert isinstance(attention.plan(view, sees), split.Plan)


def on_device(view):
    """The view as if its tokens were on a GPU."""
    return replace(view, ids_BS=SimpleNamespace(is_cuda=True, is_cpu=False))


def packed_kernel(
    q_ThD, k_TgD, v_TgD, starts_q, starts_k, longest_q, longest_k, softmax_scale, causal, window_size, softcap=None
):
    """What flash-attn documents of `flash_attn_varlen_func`, by loops over the runs."""
    assert starts_q.dtype == torch.int32 and torch.equal(starts_q, starts_k) and longest_q == longest_k
    assert starts_q[0] == 0 and starts_q[-1] == len(q_ThD) and longest_q >= starts_q.diff().max()
    out = []
    for first, last in pairwise(starts_q.tolist()):
        run = [x[first:last].transpose(0, 1)[None] for x in (q_ThD, k_TgD, v_TgD)]
        size = last - first
        left, right = (size if reach < 0 else reach for reach in window_size)
        distance = torch.arange(size)[:, None] - torch.arange(size)
        mask = (distance <= left) & (-distance <= (0 if causal else right))
        out.append(naive(*run, mask[None], softmax_scale, softcap)[0])
    return torch.cat(out)


@pytest.mark.parametrize("pattern", [Pattern(None), AUTOREGRESSIVE, Pattern(1)], ids=["full", "causal", "one token"])
def test_the_runs_handed_to_flash_attention_mean_the_same_as_the_mask(make_batch, assert_same, monkeypatch, pattern):
    batch = packed(make_batch)
    view = pattern.lay_out(batch, [batch.maskable_BL] * (pattern is not AUTOREGRESSIVE), MASK)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
    monkeypatch.setattr(flash, "kernel", lambda: packed_kernel)
    plan = flash.plan(on_device(view), sees)
    assert plan is not None
    inputs = qkv(view, 4, 2)
    for window, softcap in [(None, None), (3, None), (1, 2.0)]:
        assert_same((plan, dense.plan(view, sees)), inputs, 0.5, window, softcap)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_torchs_own_kernel_is_called_as_flash_attention_is(make_batch, assert_same, monkeypatch, causal, window):
    def varlen_attn(*runs, scale, window_size, enable_gqa):
        """What torch documents of it: a causal order is a window without a right side."""
        assert enable_gqa
        left, right = window_size
        return packed_kernel(*runs, scale, right == 0, (left, -1 if right == 0 else right))

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
    own = flash.own_kernel()
    monkeypatch.setattr(flash, "kernel", lambda: own)
    batch = packed(make_batch)
    view = (AUTOREGRESSIVE if causal else Pattern(None)).lay_out(batch, [] if causal else [batch.maskable_BL], MASK)
    plan = flash.plan(on_device(view), sees)
    plan = replace(plan, masked=dense.plan(view, sees))
    inputs = qkv(view, 4, 2)
    for softcap in (None, 2.0):
        assert_same((plan, dense.plan(view, sees)), inputs, 0.5, window, softcap)
    assert plan.windows == {window}  # torch's has no softcap, so that one went by the mask


def test_without_shared_keys_torchs_own_kernel_is_none(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal: None)
    assert flash.own_kernel() is None


BACKENDS = {"dense": dense.Plan, "split": split.Plan, "auto": split.Plan}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", [Pattern(3, "clean"), Pattern(None), AUTOREGRESSIVE], ids=str)
def test_a_backend_may_be_asked_for(make_batch, backend, pattern):
    batch = packed(make_batch)
    view = pattern.lay_out(batch, [batch.maskable_BL], MASK)
    plan = attention.plan(view, sees, backend=backend)
    assert type(plan) is BACKENDS[backend]
    inputs = qkv(view, 4, 2)
    assert torch.allclose(plan.attend(*inputs, 0.7), naive(*inputs, attention_mask(view), 0.7))


@pytest.mark.parametrize("backend", ["flex", "fa4", "flash"])
def test_a_backend_that_does_not_compute_a_view_leaves_it_to_the_fastest_and_cannot_be_required(make_batch, backend):
    view = AUTOREGRESSIVE.lay_out(packed(make_batch), [], MASK)
    assert isinstance(attention.plan(view, sees, backend=backend), split.Plan)
    for fine in ("auto", "dense", "split"):
        attention.require(fine, view, sees)
    said = f"model.attention: {backend} does not compute this recipe's views; it {attention.NEEDS[backend]}"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        attention.require(backend, view, sees)
    with pytest.raises(ValueError, match=r"model.attention: split does not compute .* it needs a CPU"):
        attention.require("split", on_device(view), sees)


def test_flash_leaves_other_predicates_and_views_to_the_mask(make_batch, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
    monkeypatch.setattr(flash, "kernel", lambda: packed_kernel)
    batch = packed(make_batch)
    full = on_device(Pattern(None).lay_out(batch, [batch.maskable_BL], MASK))
    assert flash.plan(full, lambda q, k: sees(q, k)) is None
    assert flash.plan(on_device(Pattern(3).lay_out(batch, [batch.maskable_BL], MASK)), sees) is None
    assert flash.plan(on_device(Pattern(1, "clean").lay_out(batch, [batch.maskable_BL], MASK)), sees) is None
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    assert flash.plan(full, sees) is None  # float32 is not given away for speed
    assert flash.plan(full, sees, torch.bfloat16) is not None


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [Pattern(None), AUTOREGRESSIVE], ids=["full", "causal"])
def test_flash_equals_dense_loss_and_gradients(make_batch, make_denoiser, monkeypatch, pattern):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if flash.kernel() is None:
        pytest.skip("flash-attn is not installed")
    denoiser = make_denoiser(shift="next_token").cuda()
    batch = type(packed(make_batch))(*(x.cuda() for x in packed(make_batch)))
    copies = [] if pattern is AUTOREGRESSIVE else [(batch.maskable_BL, batch.maskable_BL.float())]
    view = pattern.lay_out(batch, [mask for mask, _ in copies], MASK)
    scored = score(batch, view, copies, ar_weight=float(not copies))

    def run():
        with torch.autocast("cuda", torch.bfloat16):
            assert isinstance(attention.plan(view, sees), flash.Plan if flash.kernel() else dense.Plan)
            loss = (denoiser(view, scored.index_N, scored.target_N) * scored.weight_N).sum()
        return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(denoiser.parameters()))])

    fast, reference = run(), (monkeypatch.setattr(flash, "kernel", lambda: None), run())[1]
    assert fast[0].item() == pytest.approx(reference[0].item(), rel=1e-2)
    assert (fast[1] - reference[1]).norm() <= 3e-2 * reference[1].norm()
