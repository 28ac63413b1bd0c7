"""FlexAttention's block mask against the dense mask, on a CPU; the compiled kernel against the dense one on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from dlm_lightning import attention
from dlm_lightning.attention import dense, flex
from dlm_lightning.view import AUTOREGRESSIVE, Pattern, attention_mask, sees

MASK = 300
PATTERNS = [Pattern(16, "clean"), Pattern(16, "clean", "causal"), Pattern(None), AUTOREGRESSIVE]


def view_of(make_batch, pattern):
    batch = make_batch([[200], [90, 100]], length=200)
    copies = 2 if pattern.context == "clean" else int(pattern != AUTOREGRESSIVE)
    return pattern.lay_out(batch, [batch.maskable_BL] * copies, MASK)


def qkv(view, dtype=torch.float32, device="cpu"):
    B, S = view.ids_BS.shape
    return [torch.randn(B, n, S, 16, dtype=dtype, device=device, requires_grad=device != "cpu") for n in (4, 2, 2)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_kernel_under_the_block_mask_equals_the_dense_backend(make_batch, monkeypatch, pattern, window, softcap):
    view = view_of(make_batch, pattern)
    monkeypatch.setattr(flex, "kernel", lambda: flex_attention)  # not compiled: it looks at all pairs
    inputs = qkv(view)
    mine, reference = (p.attend(*inputs, 0.3, window, softcap) for p in (flex.Plan(view, sees), dense.plan(view, sees)))
    assert torch.allclose(mine, reference, atol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_kernel_is_told_of_every_tile_with_a_pair_and_of_none_as_whole_that_is_not(make_batch, pattern, window):
    view = view_of(make_batch, pattern)
    mask = flex.block_mask(view, sees, window)
    S = view.ids_BS.shape[1]
    short = -S % flex.SIZE
    seen_BSS = torch.nn.functional.pad(attention_mask(view, window=window), (0, short, 0, short))
    tiles = seen_BSS.unflatten(2, (-1, flex.SIZE)).unflatten(1, (-1, flex.SIZE)).transpose(2, 3).flatten(3)

    def listed(counts, which):
        chosen_BQT = torch.zeros(tiles.shape[:3])
        for b, q in torch.cartesian_prod(*(torch.arange(n) for n in tiles.shape[:2])).tolist():
            chosen_BQT[b, q, which[b, 0, q, : counts[b, 0, q]].long()] += 1
        return chosen_BQT

    looked = listed(mask.kv_num_blocks, mask.kv_indices)
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert (looked + whole).max() == 1
    assert ((looked + whole).bool() >= tiles.any(3)).all()
    inside_BSS = torch.nn.functional.pad(attention_mask(view, window=window), (0, short, 0, short), value=True)
    inside = inside_BSS.unflatten(2, (-1, flex.SIZE)).unflatten(1, (-1, flex.SIZE)).transpose(2, 3).flatten(3)
    assert (whole.bool() <= inside.all(3)).all()


@pytest.mark.slow
def test_compiled_for_one_view_it_serves_all_of_the_same_shape(make_batch):
    """Without gradients, which the kernel has on GPUs only."""
    graphs = []
    for seed, rows in enumerate(([[200], [90, 100]], [[120, 80], [60]], [[5] * 40, [200]])):
        batch = make_batch(rows, length=200, seed=seed)
        view = Pattern(16, "clean").lay_out(batch, [batch.maskable_BL] * 2, MASK)
        inputs = qkv(view)
        with torch.no_grad():
            mine, reference = (plan.attend(*inputs, 0.3) for plan in (flex.Plan(view, sees), dense.plan(view, sees)))
        assert torch.allclose(mine, reference, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len({*graphs}) == 1 and graphs[0] > 0


def test_it_is_for_cuda_and_the_familys_predicate(make_batch):
    assert flex.plan(view_of(make_batch, AUTOREGRESSIVE), sees) is None


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_compiled_it_equals_the_dense_backend_with_gradients(make_batch, pattern, window, softcap):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    view = view_of(make_batch, pattern).to(torch.device("cuda"))
    inputs = qkv(view, torch.bfloat16, "cuda")
    exact = [x.detach().float().requires_grad_() for x in inputs]
    mine = attention.plan(view, sees, backend="flex").attend(*inputs, 0.3, window, softcap)
    reference = dense.plan(view, sees).attend(*exact, 0.3, window, softcap)
    assert (mine - reference).norm() <= 1e-2 * reference.norm()
    weight = torch.randn_like(reference)
    mine, reference = (
        torch.autograd.grad(mine, inputs, weight.bfloat16()),
        torch.autograd.grad(reference, exact, weight),
    )
    for a, b in zip(mine, reference, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()
