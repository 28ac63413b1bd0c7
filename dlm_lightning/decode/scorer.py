"""Scorers: how sure the network is of a token, by which selectors choose.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Scorer = Callable[[Tensor, Tensor], Tensor]


def confidence(p_NV: Tensor, token_N: Tensor) -> Tensor:
    """The token's own probability."""
    return p_NV.gather(1, token_N[:, None]).squeeze(1)


def margin(p_NV: Tensor, token_N: Tensor) -> Tensor:
    """The token's probability less that of the likeliest other one, in [-1, 1]."""
    others_NV = p_NV.scatter(1, token_N[:, None], 0.0)
    return confidence(p_NV, token_N) - others_NV.amax(1)


def entropy(p_NV: Tensor, token_N: Tensor) -> Tensor:
    """1 - H / log V for the entropy H of the distribution: 1 is certain, 0 is uniform."""
    return 1 + torch.xlogy(p_NV, p_NV).sum(1) / torch.log(torch.tensor(p_NV.shape[1]))


SCORERS: dict[str, Scorer] = {"confidence": confidence, "margin": margin, "entropy": entropy}
