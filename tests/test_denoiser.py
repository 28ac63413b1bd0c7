"""The Denoiser against transformers' own forward pass under an explicit mask."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning import denoiser as module
from dlm_lightning.view import Pattern, attention_mask, predictors

PATTERN = Pattern(3, "clean")
by_family = pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
by_tied = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
by_shift = pytest.mark.parametrize("shift", ["none", "next_token"])


def shown(make_batch, denoiser, copies: int = 1):
    """A view with packed, continued and padded documents, and the flat indices of its masked tokens."""
    batch = make_batch([[7, 4], [10]], length=12, starts={(1, 0): 37})
    view = PATTERN.lay_out(batch, [batch.maskable_BL & (batch.u_BL < 0.6)] * copies, denoiser.mask_id)
    keep_N = (view.ids_BS == denoiser.mask_id).flatten().nonzero().squeeze(1)
    return batch, view, keep_N


@by_family
@by_tied
@by_shift
def test_logits_are_the_networks_own_at_the_predicting_positions(
    make_batch, make_denoiser, plain_logits, family, tied, shift
):
    denoiser = make_denoiser(family, tied, shift=shift)
    _, view, keep_N = shown(make_batch, denoiser, copies=2)
    with torch.no_grad():
        logits_NV = denoiser(view, keep_N)
    read_BS = predictors(view, denoiser.mask_id, shift)
    plain_BSV = [
        plain_logits(denoiser, *row) for row in zip(view.ids_BS, view.position_BS, attention_mask(view), strict=True)
    ]
    for n, keep in enumerate(keep_N.tolist()):
        b, s = divmod(keep, view.ids_BS.shape[1])
        expected_V = plain_BSV[b][read_BS[b, s]]
        assert torch.allclose(logits_NV[n, :300], expected_V[:300], rtol=1e-4, atol=1e-4)


def test_kept_positions_come_in_the_order_asked_for(make_batch, make_denoiser):
    denoiser = make_denoiser()
    _, view, keep_N = shown(make_batch, denoiser)
    with torch.no_grad():
        backward_NV, forward_NV = denoiser(view, keep_N.flip(0)), denoiser(view, keep_N)
    assert torch.equal(backward_NV.flip(0), forward_NV)
    assert not torch.equal(backward_NV, forward_NV)


def test_the_mask_and_rows_without_a_token_are_never_predicted(make_batch, make_denoiser):
    network = make_denoiser().network
    denoiser = module.Denoiser(network, mask_id=17, token_ids=[*range(290)])
    batch = make_batch([[6]], vocab=17)
    view = PATTERN.lay_out(batch, [batch.maskable_BL], 17)
    keep_N = torch.tensor([1, 4])
    with torch.no_grad():
        logits_NV = denoiser(view, keep_N)
        nll_N = denoiser(view, keep_N, batch.ids_BL[0, keep_N])
    banned = [17, *range(290, 301)]
    assert (logits_NV[:, banned] == -torch.inf).all()
    assert logits_NV.isfinite().sum().item() == 2 * 289
    kept_NV = logits_NV[:, [v for v in range(301) if v not in banned]]
    expected_N = kept_NV.logsumexp(1) - logits_NV.gather(1, batch.ids_BL[0, keep_N][:, None])[:, 0]
    assert torch.allclose(nll_N, expected_N, atol=1e-5)


def test_nothing_to_score_has_loss_zero_and_gradients(make_batch, make_denoiser):
    denoiser = make_denoiser()
    batch = make_batch([[]], length=5)
    view = PATTERN.lay_out(batch, [batch.maskable_BL], denoiser.mask_id)
    none_N = torch.empty(0, dtype=torch.long)
    for loss in (denoiser(view, none_N, none_N).sum(), denoiser(view, none_N, none_N, none_N.float())[0]):
        loss.backward()
        assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in denoiser.parameters())


def test_tokens_are_predicted_the_same_whatever_stands_beside_them(make_batch, make_denoiser):
    denoiser = make_denoiser(shift="next_token")
    _, view, keep_N = shown(make_batch, denoiser)
    size = view.ids_BS.shape[1]
    with torch.no_grad():
        together_NV = denoiser(view, keep_N)
        second = type(view)(*(x[1:] for x in view.coordinates))
        alone_NV = denoiser(second, keep_N[keep_N >= size] - size)
    assert torch.allclose(together_NV[keep_N >= size], alone_NV, atol=1e-5)


def test_the_predicate_decides_who_sees_whom(make_batch, make_denoiser, plain_logits):
    def everything(q, k):
        return (q.document_BS == k.document_BS) | True

    denoiser = make_denoiser(predicate=everything)
    batch = make_batch([[5]])
    view = Pattern(1).lay_out(batch, [batch.maskable_BL], denoiser.mask_id)
    with torch.no_grad():
        logits_NV = denoiser(view, torch.arange(1, 5))
    seen = torch.ones(5, 5, dtype=torch.bool)
    expected = plain_logits(denoiser, view.ids_BS[0], view.position_BS[0], seen)[1:]
    assert torch.allclose(logits_NV[:, :300], expected[:, :300], atol=1e-4)
    assert not torch.allclose(expected, plain_logits(denoiser, view.ids_BS[0], view.position_BS[0], seen.tril())[1:])
