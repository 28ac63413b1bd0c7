"""FlexAttention's block mask against the dense mask, on a CPU; the compiled kernel against the dense one on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from dlm_lightning import attention
from dlm_lightning.attention import dense, flex
from dlm_lightning.view import AUTOREGRESSIVE, Pattern, attention_mask, sees

MASK = 300
GUARD = "torch.nn.attention.flex_attention._validate_device"  # refuses gradients on CPUs
PATTERNS = [Pattern(16, "clean"), Pattern(16, "clean", "causal"), Pattern(None), AUTOREGRESSIVE]


def view_of(make_batch, pattern):
    batch = make_batch([[200], [90, 100]], length=200)
    copies = 2 if pattern.context == "clean" else int(pattern != AUTOREGRESSIVE)
    return pattern.lay_out(batch, [batch.maskable_BL] * copies, MASK)


def qkv(view, dtype=torch.float32, device="cpu", size=64):
    B, S = view.ids_BS.shape
    return [torch.randn(B, n, S, size, dtype=dtype, device=device, requires_grad=device != "cpu") for n in (4, 2, 2)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_kernel_under_the_block_mask_equals_the_dense_backend(
    make_batch, assert_same, monkeypatch, pattern, window, softcap
):
    """With gradients: torch refuses them on CPUs, since its compiled kernel there has none, but its definition has."""
    view = view_of(make_batch, pattern)
    monkeypatch.setattr(flex, "kernel", lambda: flex_attention)  # not compiled: it looks at all pairs
    monkeypatch.setattr(GUARD, lambda *_: None, raising=False)
    assert_same((flex.Plan(view, sees), dense.plan(view, sees)), qkv(view), 0.3, window, softcap)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_small_heads_are_padded_to_what_the_kernel_takes(make_batch, assert_same, monkeypatch, scaling):
    view, taken = view_of(make_batch, PATTERNS[0]), []

    def kernel(q, k, v, **options):
        taken.extend(x.shape[3] for x in (q, k, v))
        return flex_attention(q, k, v, **options)

    monkeypatch.setattr(flex, "kernel", lambda: kernel)
    monkeypatch.setattr(GUARD, lambda *_: None, raising=False)
    assert_same((flex.Plan(view, sees), dense.plan(view, sees)), qkv(view, size=8), scaling)
    assert set(taken) == {16}


@pytest.mark.parametrize("queries", [flex.SIZE, 2 * flex.SIZE])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_kernel_is_told_of_every_tile_with_a_pair_and_of_none_as_whole_that_is_not(
    make_batch, pattern, window, queries
):
    view = view_of(make_batch, pattern)
    mask = flex.block_mask(view, sees, window, queries)
    assert (queries, flex.SIZE) == mask.BLOCK_SIZE
    S = view.ids_BS.shape[1]

    def tiles_of(beyond: bool):
        """The pairs of each tile, [B, Q, T, pairs]."""
        edges = (0, -S % flex.SIZE, 0, -S % queries)
        seen_BSS = torch.nn.functional.pad(attention_mask(view, window=window), edges, value=beyond)
        return seen_BSS.unflatten(2, (-1, flex.SIZE)).unflatten(1, (-1, queries)).transpose(2, 3).flatten(3)

    tiles = tiles_of(False)

    def listed(counts, which):
        chosen_BQT = torch.zeros(tiles.shape[:3])
        for b, q in torch.cartesian_prod(*(torch.arange(n) for n in tiles.shape[:2])).tolist():
            chosen_BQT[b, q, which[b, 0, q, : counts[b, 0, q]].long()] += 1
        return chosen_BQT

    looked = listed(mask.kv_num_blocks, mask.kv_indices)
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert (looked + whole).max() == 1
    assert ((looked + whole).bool() >= tiles.any(3)).all()
    assert (whole.bool() <= tiles_of(True).all(3)).all()


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


class Kernel:
    """FlexAttention without a compiler, and what it was asked for."""

    def __call__(self, *inputs, kernel_options, **options):
        self.asked = kernel_options, options["block_mask"].BLOCK_SIZE
        return flex_attention(*inputs, **options)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("generation, queries", [(9, 128), (10, 256)])
def test_fa4_is_the_same_under_tiles_of_its_own(make_batch, assert_same, monkeypatch, generation, queries):
    """On Hopper and Blackwell, with torch 2.13 and flash-attn-4, in half precision; its kernel is torch's to choose."""
    view, kernel = view_of(make_batch, PATTERNS[0]), Kernel()
    with monkeypatch.context() as gpu:
        gpu.setattr(flex, "plan", flex.Plan)
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        gpu.setattr(torch.cuda, "get_device_capability", lambda: (generation, 0))
        gpu.setattr(flex, "fa4_queries", flex.fa4_queries.__wrapped__)  # not remembered
        gpu.setattr(flex, "find_spec", lambda name: None)
        assert flex.fa4_plan(view, sees, torch.bfloat16) is None  # no flash-attn-4
        gpu.setattr(flex, "find_spec", lambda name: name)
        assert flex.fa4_plan(view, sees, torch.float32) is None
        plan = flex.fa4_plan(view, sees, torch.bfloat16)
    if torch.__version__ < "2.13":
        assert plan is None
        return
    monkeypatch.setattr(flex, "kernel", lambda: kernel)
    monkeypatch.setattr(GUARD, lambda *_: None, raising=False)
    assert_same((plan, dense.plan(view, sees)), qkv(view), 0.3)
    assert kernel.asked == ({"BACKEND": "FLASH"}, (queries, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flex", "fa4"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_compiled_it_equals_the_dense_backend_with_gradients(make_batch, pattern, window, softcap, backend):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if backend == "fa4" and flex.fa4_queries() is None:
        pytest.skip("no flash-attn-4 for this GPU and torch")
    view = view_of(make_batch, pattern).to(torch.device("cuda"))
    inputs = qkv(view, torch.bfloat16, "cuda")
    exact = [x.detach().float().requires_grad_() for x in inputs]
    mine = attention.plan(view, sees, dtype=torch.bfloat16, backend=backend).attend(*inputs, 0.3, window, softcap)
    reference = dense.plan(view, sees).attend(*exact, 0.3, window, softcap)
    assert (mine - reference).norm() <= 1e-2 * reference.norm()
    weight = torch.randn_like(reference)
    mine, reference = (
        torch.autograd.grad(mine, inputs, weight.bfloat16()),
        torch.autograd.grad(reference, exact, weight),
    )
    for a, b in zip(mine, reference, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()
