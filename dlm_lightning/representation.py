"""Representation drift and geometry: linear CKA to the AR source, RankMe and α-ReQ of hidden states.

With centred features X, Y of the same N tokens and the eigenvalues σ_i of X's covariance, the largest first:

    CKA = ‖XᵀY‖_F² / (‖XᵀX‖_F ‖YᵀY‖_F)      RankMe = exp(−Σ p_i ln p_i), p_i = σ_i / Σσ      σ_i ∝ i^(−α)

RankMe is taken of the covariance's eigenvalues, as in arXiv 2509.23024; the original one takes the singular values of
X. α-ReQ's α is fitted by least squares in logarithms with weights 1/i.

Shapes: N tokens, D features of the model, E features of the source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedModel

from dlm_lightning.source import decoder_layers

RANKS = (5, 100)  # of the eigenvalues that α is fitted to, from 1; fewer where there are fewer


class Geometry(Metric):
    """`cka`, `rankme`, `alpha_req` and the fit's `alpha_req_r2` of hidden states beside the source's.

    It keeps sums of products only, so that it adds up over batches and ranks.

    Args:
        features: D, the width of the model's states.
        source_features: E, the width of the source's.
    """

    full_state_update = False
    count: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor

    def __init__(self, features: int, source_features: int) -> None:
        super().__init__()
        widths = {"x": features, "y": source_features}
        for name in ("count", *widths, "xx", "yy", "xy"):
            shape = [widths[letter] for letter in name if name != "count"]
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x_ND: Tensor, y_NE: Tensor) -> None:
        """Add the states of the same tokens in the model and in the source."""
        x_ND, y_NE = x_ND.double(), y_NE.double()
        self.count += len(x_ND)
        self.x += x_ND.sum(0)
        self.y += y_NE.sum(0)
        self.xx += x_ND.T @ x_ND
        self.yy += y_NE.T @ y_NE
        self.xy += x_ND.T @ y_NE

    def compute(self) -> dict[str, Tensor]:
        """nan where there are too few tokens, or none that differ."""
        xx_DD = self.xx / self.count - torch.outer(self.x, self.x) / self.count**2
        yy_EE = self.yy / self.count - torch.outer(self.y, self.y) / self.count**2
        xy_DE = self.xy / self.count - torch.outer(self.x, self.y) / self.count**2
        cka = xy_DE.square().sum() / (xx_DD.norm() * yy_EE.norm())
        if not torch.isfinite(xx_DD).all():
            return dict.fromkeys(("cka", "rankme", "alpha_req", "alpha_req_r2"), cka)
        values_D = torch.linalg.eigvalsh(xx_DD).flip(0).clamp(min=0)
        alpha, r2 = power_law(values_D)
        return {"cka": cka, "rankme": rank_me(values_D), "alpha_req": alpha, "alpha_req_r2": r2}


def rank_me(value_D: Tensor) -> Tensor:
    """The exponential of the entropy of eigenvalues as shares of their sum: between 1 and D."""
    share_D = value_D / value_D.sum()
    return torch.special.entr(share_D).sum().exp()


def power_law(value_D: Tensor) -> tuple[Tensor, Tensor]:
    """α of value_i ∝ i^(−α), and R² of the fit; values are sorted, the largest first. nan below three values."""
    first, last = min(RANKS[0], max(1, len(value_D) - 2)), min(RANKS[1], len(value_D))
    positive_D = value_D > value_D[0] * 1e-12  # what is not is rounding
    keep_D = positive_D & (torch.arange(1, len(value_D) + 1, device=value_D.device) >= first)
    index_K = (keep_D.nonzero().squeeze(1) + 1)[: last - first + 1].to(value_D)
    if len(index_K) < 3:
        return value_D.new_tensor(torch.nan), value_D.new_tensor(torch.nan)
    x_K, y_K, weight_K = index_K.log(), value_D[index_K.long() - 1].log(), 1 / index_K
    weight_K = weight_K / weight_K.sum()
    x_K, y_K = x_K - (weight_K * x_K).sum(), y_K - (weight_K * y_K).sum()
    slope = (weight_K * x_K * y_K).sum() / (weight_K * x_K.square()).sum()
    rest, total = ((weight_K * values_K.square()).sum() for values_K in (y_K - slope * x_K, y_K))
    return -slope, 1 - rest / total


@contextmanager
def layer_states(network: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What the decoder layers of these numbers, from 0, give out [B, S, D] in the forwards inside, the last one's."""
    states: dict[int, Tensor] = {}

    def look(number: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            states[number] = output[0] if isinstance(output, tuple) else output

        return hook

    found = decoder_layers(network)
    hooks = [found[number].register_forward_hook(look(number)) for number in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def spread(layers: int, count: int) -> list[int]:
    """Up to `count` numbers of so many layers, from 0, evenly spread; always the last one."""
    return sorted({round((n + 1) * layers / min(count, layers)) - 1 for n in range(min(count, layers))})
