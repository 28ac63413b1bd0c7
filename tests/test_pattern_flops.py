"""FLOPs that the pattern needs: by formula, without attention's kernels, and without a trace in the network."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning import attention
from dlm_lightning.loss import Scored, score
from dlm_lightning.noise import Masked
from dlm_lightning.pattern_flops import forward_flops, pairs
from dlm_lightning.source import decoder_layers
from dlm_lightning.view import Pattern, attention_mask, sees

PATTERN = Pattern(4, "clean")


@pytest.fixture
def shown(make_batch):
    """A view of two rows of two documents, and its scored tokens."""
    batch = make_batch([[5, 7], [9, 3]], length=12)
    mask_BL = batch.maskable_BL & (batch.u_BL < 0.5)
    half = Masked(mask_BL, mask_BL.float())
    view = PATTERN.lay_out(batch, [half.mask_BL], 300)
    return view, score(batch, view, [half], 0.0)


def expected(denoiser, view, scored: Scored, windows: list[int | None]) -> int:
    """Matrices of layers for all tokens, the last feed-forward part and the head for those that are read; pairs."""
    layers, config = torch.nn.ModuleList(decoder_layers(denoiser.network)), denoiser.network.config
    tokens, read = view.ids_BS.numel(), len(scored.index_N)
    matrices = sum(p.numel() for p in layers.parameters() if p.ndim > 1)
    last = sum(p.numel() for p in layers[-1].mlp.parameters() if p.ndim > 1)
    products = 2 * (tokens * matrices - (tokens - read) * last + read * config.hidden_size * config.vocab_size)
    seen = sum(int(attention_mask(view, window=window).sum()) for window in windows)
    return products + 2 * 2 * seen * config.num_attention_heads * config.head_dim


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_matrices_and_the_pairs_that_see_each_other(make_denoiser, shown, family):
    denoiser = make_denoiser(family)
    assert forward_flops(denoiser, *shown) == expected(denoiser, *shown, [None] * 2)


def test_each_layer_by_its_own_window(make_denoiser, shown):
    denoiser = make_denoiser("gemma3_text")
    config = denoiser.network.config
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
    assert len(set(windows)) == 2
    assert forward_flops(denoiser, *shown) == expected(denoiser, *shown, windows)


@pytest.mark.parametrize("window", [None, 3])
def test_pairs_are_counted_in_pieces(shown, monkeypatch, window):
    monkeypatch.setattr("dlm_lightning.pattern_flops.QUERIES", 7)
    assert pairs(shown[0], sees, window) == int(attention_mask(shown[0], window=window).sum())


def test_no_kernel_is_asked(make_denoiser, shown, monkeypatch):
    """One that is compiled while operations are counted would stay uncompiled for good, or fail."""

    def plan(*_args, **_options):
        raise AssertionError("attention was asked for")

    monkeypatch.setattr(attention, "plan", plan)
    denoiser = make_denoiser()
    forward_flops(denoiser, *shown)
    with pytest.raises(AssertionError, match="asked for"):  # as any other forward does
        denoiser(shown[0], shown[1].index_N)


def test_layers_that_are_compiled_stay_so(make_denoiser, shown, graphs):
    denoiser = make_denoiser().train()
    for layer in decoder_layers(denoiser.network):
        layer.compile()
    found = forward_flops(denoiser, *shown)
    assert not graphs
    denoiser(shown[0], shown[1].index_N)
    assert graphs
    assert forward_flops(denoiser, *shown) == found


def test_the_network_is_left_as_it_was(make_denoiser, shown):
    denoiser = make_denoiser().train()
    layers = decoder_layers(denoiser.network)
    layers[0].mlp.eval()
    for layer in layers:
        layer.self_attn.attention_dropout = 0.5
    before = [module.training for module in denoiser.modules()], torch.get_rng_state()
    forward_flops(denoiser, *shown)
    assert [module.training for module in denoiser.modules()] == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert "plan" not in vars(denoiser) and all(p.grad is None for p in denoiser.parameters())
