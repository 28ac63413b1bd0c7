"""Attention part by part against the dense backend: outputs, gradients, what is skipped and what is kept."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning.attention import dense, parts, split
from dlm_lightning.flops import FlopCounter
from dlm_lightning.loss import score
from dlm_lightning.view import AUTOREGRESSIVE, Pattern, sees

MASK = 300
ROWS = {  # of more than a tile
    "one document": [[150], [150]],
    "packed alike": [[70, 80], [70, 80]],
    "packed each its way": [[150], [60, 50, 3], [7] * 20, []],
}
PATTERNS = [
    Pattern(16, "clean"),
    Pattern(50, "clean"),
    Pattern(7, "clean", "causal"),
    Pattern(16),
    Pattern(None),
    AUTOREGRESSIVE,
]


def view_of(make_batch, pattern, rows, length=150):
    batch = make_batch(ROWS[rows], length=length)
    copies = 2 if pattern.context == "clean" else int(pattern != AUTOREGRESSIVE)
    return pattern.lay_out(batch, [batch.maskable_BL & (batch.u_BL < p) for p in (0.4, 0.7)[:copies]], MASK)


def qkv(view, heads: int, kv_heads: int, dtype=torch.float64):
    B, S = view.ids_BS.shape
    return [torch.randn(B, n, S, 8, dtype=dtype, requires_grad=True) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_it_equals_the_dense_backend_with_gradients(make_batch, pattern, rows, window, heads, kv_heads):
    view = view_of(make_batch, pattern, rows)
    inputs = qkv(view, heads, kv_heads)
    plans = split.plan(view, sees), dense.plan(view, sees)
    mine, reference = (plan.attend(*inputs, 0.3, window) for plan in plans)
    assert torch.allclose(mine, reference)
    weight = torch.randn_like(mine)
    mine, reference = (torch.autograd.grad(out, inputs, weight) for out in (mine, reference))
    assert all(torch.allclose(a, b) for a, b in zip(mine, reference, strict=True))


@pytest.mark.parametrize("reach", [1, 50])
@pytest.mark.parametrize("rows", ROWS)
def test_gradients_are_the_same_however_many_keys_at_a_time(make_batch, monkeypatch, rows, reach):
    view = view_of(make_batch, Pattern(16, "clean"), rows)
    inputs = qkv(view, 4, 2)
    monkeypatch.setattr(split, "REACH", reach)
    outs = [backend.plan(view, sees).attend(*inputs, 0.3) for backend in (split, dense)]
    mine, reference = (torch.autograd.grad(out, inputs, torch.ones_like(out)) for out in outs)
    assert all(torch.allclose(a, b) for a, b in zip(mine, reference, strict=True))


@pytest.mark.parametrize("rows", ROWS)
def test_layers_share_masks(make_batch, rows):
    """Forward passes and then backward ones in reverse order, with windows, and heads that share keys otherwise."""
    view = view_of(make_batch, Pattern(16, "clean"), rows)
    layers = [(qkv(view, heads, 2), window) for heads, window in ((4, None), (4, 20), (2, None), (4, None))]
    found = []
    for plan in (split.plan(view, sees), dense.plan(view, sees)):
        outs = [plan.attend(*inputs, 0.3, window) for inputs, window in layers]
        pairs = [*zip(outs, (inputs for inputs, _ in layers), strict=True)]
        found.append([torch.autograd.grad(out, inputs, torch.ones_like(out)) for out, inputs in reversed(pairs)])
    for mine, reference in zip(*found, strict=True):
        assert all(torch.allclose(a, b) for a, b in zip(mine, reference, strict=True))


def test_a_predicate_of_ones_own(make_batch):
    def strided(q, k):
        return sees(q, k) & ((q.position_BS - k.position_BS) % 3 == 0)

    view = view_of(make_batch, Pattern(16, "clean"), "packed each its way")
    inputs = qkv(view, 4, 2)
    mine, reference = (backend.plan(view, strided).attend(*inputs, None) for backend in (split, dense))
    assert torch.allclose(mine, reference)


def test_what_no_query_of_a_tile_sees_is_skipped(make_batch):
    """Of 4 × 4 tiles of each two copies, all meet clean ones up to their own place, noisy ones besides their blocks."""
    size = parts.SIZE
    batch = make_batch([[4 * size]], length=4 * size)
    view = Pattern(16, "clean").lay_out(batch, [batch.maskable_BL] * 2, MASK)
    inputs = qkv(view, 2, 2)

    def flops(plan) -> int:
        with FlopCounter() as counter:
            plan.attend(*inputs, None).sum().backward()
        return counter.get_total_flops()

    tiles = 3 * (4 * 5 // 2) + 2 * 4 * parts.BLOCKS[0] / size
    assert flops(split.plan(view, sees)) / flops(dense.plan(view, sees)) == pytest.approx(tiles / (3 * 4) ** 2)


def test_nothing_as_large_as_all_pairs_is_made_or_kept(make_batch):
    batch = make_batch([[1024]], length=1024)
    view = Pattern(16, "clean").lay_out(batch, [batch.maskable_BL], MASK)
    plan = split.plan(view, sees)
    assert sum(part.mask_bnQP.numel() for part in plan.lay_out() if part.mask_bnQP is not None) < 2048**2 / 10
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        plan.attend(*qkv(view, 2, 2), None)
    assert sum(kept) < 5 * 2048 * 2 * 8


def test_bfloat16_is_computed_in_float32(make_batch):
    """Under autocast, rotary positions leave queries and keys in float32; the values say what is asked for."""
    view = view_of(make_batch, Pattern(16, "clean"), "one document")
    inputs = [x.detach().bfloat16().requires_grad_() for x in qkv(view, 4, 2)]
    exact = dense.plan(view, sees).attend(*(x.double() for x in inputs), None)
    for given in (inputs, [*(x.float() for x in inputs[:2]), inputs[2]]):
        out = split.plan(view, sees).attend(*given, None)
        assert out.dtype == torch.bfloat16
        assert torch.allclose(out.double(), exact, atol=2**-8)
        assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "mistral"])
def test_loss_and_gradients_of_a_network(make_batch, make_denoiser, family):
    batch = make_batch([[70, 80], [100]], length=150)
    copies = [(batch.maskable_BL & (batch.u_BL < 0.5), batch.maskable_BL * batch.t_BL)]
    copies = [(mask, mask * weight) for mask, weight in copies]
    losses = {}
    for backend in ("split", "dense"):
        denoiser = make_denoiser(family, backend=backend)
        view = Pattern(16, "clean").lay_out(batch, [copies[0][0]], MASK)
        scored = score(batch, view, copies)
        loss = (denoiser(view, scored.index_N, scored.target_N) * scored.weight_N).sum()
        losses[backend] = (loss.item(), torch.autograd.grad(loss, list(denoiser.parameters()), allow_unused=True))
    assert losses["split"][0] == pytest.approx(losses["dense"][0], rel=1e-5)
    for mine, reference in zip(losses["split"][1], losses["dense"][1], strict=True):
        assert (mine - reference).norm() <= 1e-4 * reference.norm() + 1e-6
