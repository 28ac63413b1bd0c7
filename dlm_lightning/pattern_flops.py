"""FLOPs that a pattern needs of a forward pass, whatever a backend computes beyond them.

Shapes: B rows, S tokens of a row of the view; attention has H query heads and G key and value heads, of D numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlm_lightning.denoiser import Denoiser
from dlm_lightning.flops import FlopCounter
from dlm_lightning.loss import Scored
from dlm_lightning.view import View, near

QUERIES = 1024  # tokens whose pairs are looked at together


@torch.no_grad()
def forward_flops(denoiser: Denoiser, view: View, scored: Scored) -> int:
    """FLOPs of a forward pass that the pattern needs: products of matrices, and attention of pairs that see each other.

    Makes one, without attention and without compiled code: a kernel that is compiled while operations are counted would
    stay uncompiled for good, and what it computes beyond those pairs is no use.
    """
    pairs = _Pairs(view, denoiser.predicate)
    in_training = [module for module in denoiser.modules() if module.training]
    denoiser.eval()  # without activation checkpointing, under which the last layer is computed for all tokens
    denoiser.plan = lambda *_: pairs  # type: ignore[method-assign, assignment, return-value]
    try:
        with torch.compiler.set_stance("force_eager"), FlopCounter() as counter:
            denoiser(view, scored.index_N, scored.target_N)
    finally:
        del denoiser.plan  # the instance's
        for module in in_training:
            module.training = True
    return counter.get_total_flops() + pairs.flops


class _Pairs:
    """In place of attention: sees nothing, and counts two products for each pair that sees each other in a layer."""

    def __init__(self, view: View, predicate: Callable[[View, View], Tensor]) -> None:
        self.view, self.predicate = view, predicate
        self.flops = 0
        self._found: dict[int | None, int] = {}

    def attend(
        self, q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, _scaling: Any, window: int | None = None, *_: Any
    ) -> Tensor:
        """Zeros [B, S, H, D]."""
        if window not in self._found:
            self._found[window] = pairs(self.view, self.predicate, window)
        B, H, S, D = q_BHSD.shape
        self.flops += 2 * self._found[window] * H * (D + v_BGSD.shape[-1])
        return v_BGSD.new_zeros(B, S, H, v_BGSD.shape[-1])


def pairs(view: View, predicate: Callable[[View, View], Tensor], window: int | None = None) -> int:
    """How many pairs of tokens see each other, counted piece by piece."""

    def seen(query: View, key: View) -> Tensor:
        found = predicate(query, key)
        return found if window is None else found & near(query, key, window)

    B, S = view.ids_BS.shape
    pieces = ((slice(b, b + 1), slice(first, first + QUERIES)) for b in range(B) for first in range(0, S, QUERIES))
    return sum(int(seen(view[row, part, None], view[row, None, :]).sum()) for row, part in pieces)
