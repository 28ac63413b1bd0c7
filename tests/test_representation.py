"""CKA, RankMe and α-ReQ against their definitions on whole matrices; sums over batches; layers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dlm_lightning.representation import Geometry, layer_states, power_law, rank_me, spread
from dlm_lightning.view import AUTOREGRESSIVE


def features(seed: int, tokens: int = 400, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, width + 1).float() ** -0.7
    return torch.randn(tokens, width, generator=generator) * scale + 3.0


def measured(x, y, parts: int = 1) -> dict[str, float]:
    metric = Geometry(x.shape[1], y.shape[1])
    for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
        metric.update(x_part, y_part)
    return {name: value.item() for name, value in metric.compute().items()}


def test_cka_is_that_of_the_centred_gram_matrices():
    """HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) of the N × N kernels, which the implementation never forms."""
    x, y = features(0), torch.cat([features(0)[:, :9] * 2 + 3 * features(1)[:, :9], features(2)[:, :4]], 1)
    centre = torch.eye(len(x)) - 1 / len(x)
    k, kernel_y = (centre @ (z @ z.T) @ centre for z in (x, y))
    wanted = (k * kernel_y).sum() / (k.norm() * kernel_y.norm())
    assert measured(x, y)["cka"] == pytest.approx(wanted.item(), rel=1e-4)
    assert 0.05 < wanted < 0.95


def test_cka_does_not_see_rotation_scale_and_shift():
    x = features(0)
    rotation = torch.linalg.qr(features(5, 24, 24)).Q
    assert measured(x, 4 * x @ rotation + 1)["cka"] == pytest.approx(1)
    assert measured(x, features(9))["cka"] < 0.2


def test_rankme_is_that_of_the_covariance():
    x = features(3)
    values = np.linalg.svd((x - x.mean(0)).double().numpy(), compute_uv=False) ** 2
    share = values / values.sum()
    assert measured(x, x)["rankme"] == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-6)


def test_rankme_of_equal_directions_is_their_number():
    assert rank_me(torch.tensor([2.0, 2, 2, 0, 0])).item() == pytest.approx(3)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.7])
def test_alpha_of_a_power_law(alpha):
    found, r2 = power_law(torch.arange(1, 201).double() ** -alpha)
    assert found.item() == pytest.approx(alpha) and r2.item() == pytest.approx(1)


def test_alpha_is_weighted_least_squares():
    """Against numpy's own fit, whose weights multiply residuals, over ranks 5 to 100."""
    values = torch.sort(
        torch.rand(150, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), descending=True
    )
    ranks = np.arange(5, 101)
    slope = np.polyfit(np.log(ranks), np.log(values.values.numpy()[4:100]), 1, w=ranks**-0.5)[0]
    assert power_law(values.values)[0].item() == pytest.approx(-slope, rel=1e-9)


def test_batches_add_up():
    x, y = features(0), features(1)
    assert measured(x, y, parts=7) == pytest.approx(measured(x, y), rel=1e-9)


def test_too_few_tokens_or_none_that_differ_give_no_number():
    assert all(math.isnan(value) for value in measured(torch.empty(0, 6), torch.empty(0, 6)).values())
    same = measured(torch.ones(9, 6), torch.ones(9, 6))
    assert math.isnan(same["cka"]) and math.isnan(same["alpha_req"])


def test_states_are_those_of_the_layers(make_denoiser, make_batch, family):
    denoiser, batch = make_denoiser(family), make_batch([[8]])
    view = AUTOREGRESSIVE.lay_out(batch, [], denoiser.mask_id)
    with torch.no_grad(), layer_states(denoiser.network, [0, 1]) as states:
        denoiser(view, torch.arange(1, 3))
    assert list(states) == [0, 1] and states[0].shape == (1, 8, 32)
    assert not torch.equal(states[0], states[1])
    seen = dict(states)
    with torch.no_grad():
        denoiser(view, torch.arange(1, 3))
    assert states == seen  # no hook is left


@pytest.mark.parametrize("layers, count, wanted", [(4, 4, [0, 1, 2, 3]), (28, 4, [6, 13, 20, 27]), (2, 4, [0, 1])])
def test_layers_are_evenly_spread(layers, count, wanted):
    assert spread(layers, count) == wanted
