"""What moves and how fast: frozen parameters, and AdamW with a learning rate of its own for the mask token's row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from dlm_lightning import lora, shards
from dlm_lightning.denoiser import Denoiser


@dataclass(frozen=True)
class LrScale:
    """Factors of the learning rate; everything that is not named here has 1.

    Args:
        mask_row: for the mask token's row of the embedding.
        embedding: for the embedding's other rows, which with tied weights are the head's. With 0 the mask row is moved
            alone and without weight decay.
    """

    mask_row: float = 1.0
    embedding: float = 1.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"model.lr_scale.{name} must be at least 0, not {value}")


def check_rates(lr: float, betas: tuple[float, float], **at_least_0: float) -> None:
    """ValueError, naming the key, for a learning rate or another setting of AdamW that makes no sense."""
    for name, value in at_least_0.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"model.{name} must be at least 0, not {value}")
    if not 0 < lr < math.inf:
        raise ValueError(f"model.lr must be above 0, not {lr}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"model.betas must lie in [0, 1), not {betas}")


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Stop the parameters whose plain name matches a pattern; an adapter goes by the weight that it is added to.

    ValueError for a pattern that matches nothing, and if nothing is left to train.
    """
    names = {lora.plain(name) for name, _ in network.named_parameters(remove_duplicate=False)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"model.freeze: {pattern} matches no parameter: patterns match whole names, such as {min(names)}"
            )
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if any(fnmatchcase(lora.plain(name), pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"model.freeze: {' '.join(patterns)} leaves nothing to train")


class RowAdamW(torch.optim.AdamW):
    """AdamW in which one row of a matrix moves at a rate of its own. It holds no more state than AdamW.

    A step is linear in the learning rate, so a row that has gone some way needs to go `ratio` times as far.

    Args:
        groups: AdamW's.
        matrix: one of the parameters, which may be sharded.
        row: the row's place in the whole matrix.
        ratio: the row's rate over the matrix's; None moves this row and no other.
        **options: AdamW's.
    """

    def __init__(self, groups: Any, matrix: Tensor, row: int, ratio: float | None, **options: Any) -> None:
        super().__init__(groups, **options)
        self._matrix, self._row, self._ratio = matrix, row, ratio

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step; the closure, which may make the gradients, is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        part_RD, first = shards.local(self._matrix)
        row = slice(max(0, self._row - first), max(0, self._row - first + 1))  # empty where another rank holds it
        if self._ratio is None and self._matrix.grad is not None:
            gradient_RD, _ = shards.local(self._matrix.grad)
            kept = gradient_RD[row].clone()
            gradient_RD.zero_()[row] = kept
        before = part_RD[row].clone()
        super().step()
        if self._ratio is not None:
            part_RD[row] = before.lerp(part_RD[row], self._ratio)
        return loss


def adamw(
    denoiser: Denoiser, lr: float, scale: LrScale, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over what is trained, with weight decay on matrices only; each parameter is passed over once."""
    embedding: Any = denoiser.network.get_input_embeddings().weight
    if not embedding.requires_grad and scale != LrScale():
        raise ValueError("model.lr_scale has nothing to act on: model.freeze stops the embedding")
    alone = scale.embedding == 0 < scale.mask_row
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for parameter in filter(lambda parameter: parameter.requires_grad, denoiser.parameters()):
        factor = scale.mask_row if alone else scale.embedding
        decay = weight_decay if parameter.ndim > 1 and not (alone and parameter is embedding) else 0.0
        groups.setdefault((lr * factor if parameter is embedding else lr, decay), []).append(parameter)
    settings: Any = [{"params": params, "lr": rate, "weight_decay": d} for (rate, d), params in groups.items()]
    options: Any = {"lr": lr, "betas": betas, "fused": True}
    optimizer: torch.optim.AdamW
    if scale.mask_row == scale.embedding:
        optimizer = torch.optim.AdamW(settings, **options)
    else:
        ratio = None if alone else scale.mask_row / scale.embedding
        optimizer = RowAdamW(settings, embedding, denoiser.mask_id, ratio, **options)
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # no loss is scaled, so Lightning may clip
    return optimizer
