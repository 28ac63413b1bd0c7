"""Which token a mask would become: the likeliest one, or one that is drawn.

Shapes: B rows, N masks, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlm_lightning import noise

STREAM = 10  # of random numbers, apart from those of training


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: from softmax(logits / temperature), of the likeliest ones.

    What a row draws depends on the seed, on its number, on how many forwards it has had and on the position, not on the
    rows beside it.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: the likeliest tokens whose probabilities add up to this much, at least one.
        top_k: at most so many of the likeliest tokens; null for any number.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must lie in [0, 2**64), not {self.seed}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or null, not {self.top_k}")

    def draw(self, logits_NV: Tensor, numbers: list[int], forwards: list[int], index_N: Tensor, length: int) -> Tensor:
        """A token per mask, int64 [N], of rows with these numbers after so many forwards.

        `index_N` are the masks' places in the flattened rows of `length` tokens.
        """
        if self.temperature == 0:
            return logits_NV.argmax(1)
        above_NV = logits_NV.double() - logits_NV.amax(1, keepdim=True)  # so that any temperature divides it
        p_NV, token_NV = (above_NV / self.temperature).softmax(1).sort(dim=1, descending=True, stable=True)
        before_NV = p_NV.cumsum(1) - p_NV
        kept_NV = before_NV < self.top_p
        if self.top_k is not None:
            kept_NV[:, self.top_k :] = False
        sum_NV = (p_NV * kept_NV).cumsum(1)
        u_BL = [
            torch.from_numpy(noise.raw(self.seed, STREAM, number, forward, count=length) / 2.0**64)
            for number, forward in zip(numbers, forwards, strict=True)
        ]
        u_N = torch.cat(u_BL).to(sum_NV)[index_N]
        place_N = (sum_NV <= (u_N * sum_NV[:, -1])[:, None]).sum(1)
        return token_NV.gather(1, place_N.clamp(max=kept_NV.sum(1) - 1)[:, None]).squeeze(1)
