"""Drawn tokens, against the distribution that the definition gives."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning.decode.sampling import Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf])


def drawn(sampling: Sampling, rows: int = 400, length: int = 10) -> torch.Tensor:
    """A share per token, of many draws from LOGITS."""
    index_N = torch.arange(rows * length)
    tokens = sampling.draw(LOGITS.expand(rows * length, -1), list(range(rows)), [1] * rows, index_N, length)
    return torch.bincount(tokens, minlength=6) / (rows * length)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6, 0.01])
@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_shares_are_the_tempered_probabilities_of_what_is_kept(temperature, top_p, top_k):
    p = (LOGITS / temperature).softmax(0).tolist()
    kept, total = [], 0.0
    for token in range(6):  # already in order
        if total < top_p and (top_k is None or len(kept) < top_k):
            kept.append(token)
        total += p[token]
    expected = torch.tensor([p[token] / sum(p[k] for k in kept) if token in kept else 0.0 for token in range(6)])
    found = drawn(Sampling(temperature, top_p, top_k))
    assert (found - expected).abs().max() < 0.03  # 4,000 draws: three standard errors are 0.024
    assert not found[expected == 0].any()


def test_any_temperature_and_share_draw_a_token():
    logits_NV = torch.tensor([[1.0, 3.0, -torch.inf, 2.0]] * 4)
    index_N = torch.arange(4)
    for options in ({"temperature": 1e-300}, {"temperature": 1e-40}, {"temperature": 1.0, "top_p": 1e-300}):
        assert Sampling(**options).draw(logits_NV, [0], [1], index_N, 4).tolist() == [1] * 4
    drawn = Sampling(1e300, seed=5).draw(logits_NV.repeat(64, 1), [0], [1], torch.arange(256), 256)
    assert set(drawn.tolist()) == {0, 1, 3}


def test_temperature_0_takes_the_likeliest():
    assert drawn(Sampling())[0] == 1


def test_a_draw_depends_on_seed_row_forward_and_position_alone():
    logits_NV = torch.zeros(3, 1000)

    def tokens(numbers=(0, 1), forwards=(1, 1), index=(1, 2, 12), seed=0):
        return Sampling(1.0, seed=seed).draw(logits_NV, list(numbers), list(forwards), torch.tensor(index), 10).tolist()

    first = tokens()
    assert first == tokens() and len(set(first)) == 3
    assert tokens((1, 0), index=(11, 12, 2)) == first  # the rows in another order
    for others in (tokens((2, 3)), tokens(forwards=(2, 2)), tokens(index=(4, 5, 15)), tokens(seed=1)):
        assert not set(others) & set(first)


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must"):
        Sampling(**{name: value})
    with pytest.raises(ValueError, match="top_k must"):
        Sampling(top_k=0)
