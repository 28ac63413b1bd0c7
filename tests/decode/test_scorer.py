"""How sure the network is, against the definitions in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from dlm_lightning.decode.scorer import SCORERS

P = [[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]]
TOKENS = [0, 1, 0, 1]
BY_HAND = {
    "confidence": lambda p, token: p[token],
    "margin": lambda p, token: p[token] - max(p[:token] + p[token + 1 :]),
    "entropy": lambda p, token: 1 + sum(x * math.log(x) for x in p if x) / math.log(len(p)),
}


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_those_of_the_definition(name):
    found = SCORERS[name](torch.tensor(P), torch.tensor(TOKENS))
    assert found.tolist() == pytest.approx([BY_HAND[name](*case) for case in zip(P, TOKENS, strict=True)], abs=1e-6)
    assert BY_HAND.keys() == SCORERS.keys()
