"""Liger's fused head against plain cross-entropy under weights, on a GPU, or on a CPU by Triton's interpreter."""

from __future__ import annotations

import sys
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F

from dlm_lightning import bfloat16, liger, readout
from dlm_lightning.flops import FlopCounter
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.view import Pattern

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton, which Liger needs, is there for Linux only")
N, D, V = 37, 32, 301
BANNED = [7, V - 1]
LEAST = 4  # tokens that Liger has logits of at a time, for these sizes


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("where a GPU is, Triton's kernels run on it")
    if request.param == "cpu" and [int(n) for n in version("triton").split(".")[:2]] < [3, 7]:
        pytest.skip("before 3.7, Triton's interpreter fails under numpy 2")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cuda" and not liger.there(torch.device("cuda")):
        pytest.skip(f"{liger.PACKAGE} is not installed")
    return torch.device(request.param)


@pytest.fixture
def made(device):
    """Hidden states, head, targets and very unequal weights."""
    target_N = torch.randint(8, V - 1, (N,))
    made = torch.randn(N, D), torch.randn(V, D), target_N, 10 ** torch.randn(N), torch.tensor(BANNED)
    return [x.to(device) for x in made]


def reference(hidden_ND, head_VD, target_N, weight_N, banned_X):
    """Each −log p, and the gradients of their weighted sum, by all logits at once in float64."""
    hidden_ND, head_VD = (x.detach().double().requires_grad_() for x in (hidden_ND, head_VD))
    logits_NV = (hidden_ND @ head_VD.t()).index_fill(1, banned_X, -torch.inf)
    nll_N = F.cross_entropy(logits_NV, target_N, reduction="none")
    return nll_N, *torch.autograd.grad((nll_N * weight_N).sum(), [hidden_ND, head_VD])


def far(mine, theirs) -> float:
    return float(((mine - theirs).norm() / theirs.norm()).detach())


@pytest.mark.parametrize("at_a_time", [1, N // 3, 1000])
def test_it_is_cross_entropy_under_weights(made, products, at_a_time):
    with products(V) as logits:
        found = liger.gradients(*made, True, at_a_time)
    for mine, theirs in zip(found, reference(*made), strict=True):
        assert mine.dtype == torch.float32 and far(mine, theirs) < 1e-6
    assert max(len(x) for x in logits.found) <= max(at_a_time, LEAST) and (at_a_time < N or len(logits.found) == 1)


def test_in_bfloat16(made):
    hidden_ND, head_VD, *rest = made
    found = liger.gradients(hidden_ND.bfloat16(), head_VD.bfloat16(), *rest, True, N // 3)
    assert found[0].dtype == torch.float32
    assert all(far(mine, theirs) < 1e-2 for mine, theirs in zip(found, reference(*made), strict=True))


def test_a_frozen_head_has_no_gradient(made):
    nll_N, grad_ND = liger.gradients(*made, False, N)
    assert all(far(mine, theirs) < 1e-6 for mine, theirs in zip((nll_N, grad_ND), reference(*made)[:2], strict=True))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_denoiser_learns_the_same_by_it(make_batch, make_denoiser, monkeypatch, device, tied, precision):
    monkeypatch.setattr(liger, "there", lambda _: True)
    monkeypatch.setattr(bfloat16, "in_hardware", lambda _: True)
    batch = make_batch([[7, 4], [10]], length=12)
    found, counted, called = [], [], []
    gradients = liger.gradients
    monkeypatch.setattr(liger, "gradients", lambda *args: called.append(head) or gradients(*args))
    for head in ("torch", "liger"):
        denoiser = make_denoiser("qwen3", tied, head=head).to(device)
        view = Pattern(3, "clean").lay_out(batch, [batch.maskable_BL & (batch.u_BL < 0.6)], denoiser.mask_id)
        keep_N = (view.ids_BS == denoiser.mask_id).flatten().nonzero().squeeze(1)
        target_N, weight_N = batch.ids_BL.repeat(1, 2).flatten()[keep_N], 10 ** torch.linspace(-1, 1, len(keep_N))
        shown = [x.to(device) for x in (view, keep_N, target_N, weight_N)]
        with torch.autocast(device.type, torch.bfloat16, precision == torch.bfloat16), FlopCounter() as counter:
            loss, nll_N = denoiser(*shown)
        counted.append(counter.forward)
        found.append([loss, nll_N, *torch.autograd.grad(3 * loss, [*denoiser.parameters()])])
    assert all(
        far(mine, theirs) < (1e-5 if precision == torch.float32 else 2e-2) for theirs, mine in zip(*found, strict=True)
    )
    assert called == ["liger"]
    assert counted[0] == pytest.approx(counted[1], abs=9)  # a third of each product, rounded


def test_a_recipe_hands_the_head_on(make_recipe):
    assert make_recipe(BlockCausal, head="liger").denoiser.head == "liger"
    assert make_recipe(BlockCausal).denoiser.head == "torch"


def test_many_banned_rows_at_the_beginning(device):
    """More than Liger looks at together."""
    hidden_ND, head_VD, banned_X = torch.randn(2, 8), torch.randn(33_000, 8), torch.arange(32_900)
    made = [x.to(device) for x in (hidden_ND, head_VD, torch.tensor([32_950, 32_999]), torch.ones(2), banned_X)]
    for mine, theirs in zip(liger.gradients(*made, True, 2), reference(*made), strict=True):
        assert far(mine, theirs) < 1e-6


def test_nothing_to_score(make_batch, make_denoiser, monkeypatch):
    monkeypatch.setattr(liger, "there", lambda _: True)
    denoiser = make_denoiser(head="liger")
    view = Pattern(3, "clean").lay_out(make_batch([[5]]), [torch.zeros(1, 5, dtype=torch.bool)], denoiser.mask_id)
    none = torch.zeros(0, dtype=torch.long)
    loss, nll_N = denoiser(view, none, none, torch.zeros(0))
    assert loss == 0 and len(nll_N) == 0


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_a_head_that_does_more_is_refused(make_denoiser, monkeypatch, family):
    """A cap would lift banned tokens from −∞ to −cap."""
    monkeypatch.setattr(liger, "there", lambda _: True)
    network = make_denoiser(family).network
    if family == "granite":
        network.config.logits_scaling = 8.0
    readout.require("torch", network, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"^model.head: liger does not compute the head of {family}, but torch does$"):
        readout.require("liger", network, torch.device("cpu"))


@pytest.mark.parametrize("command", ["fit", "bench"])
def test_without_cuda_nothing_is_done(refused, small, tmp_path, monkeypatch, command):
    monkeypatch.setattr(liger, "there", lambda _: False)
    run = ("--run", "mine") if command == "fit" else ()
    said = refused(command, "block_causal", *small(model__head="liger"), *run, cwd=tmp_path)
    assert said == "model.head: liger needs CUDA and liger-kernel>=0.8.5,<0.9, the extra liger"
    assert not (tmp_path / "mine").exists()
