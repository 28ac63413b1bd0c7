"""Autoregressive training: makes the source that is converted, and serves as the control arm."""

from __future__ import annotations

from typing import Any

from dlm_lightning.module import Recipe
from dlm_lightning.noise import NELBO, Masked
from dlm_lightning.view import AUTOREGRESSIVE, Batch, Pattern


class ArSource(Recipe):
    """Next-token training under causal attention: the family's pattern without a noisy copy.

    Args:
        **options: see `Recipe`; with a source this continues its training, without one it starts from `config`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(AUTOREGRESSIVE, shift="next_token", first_token="clean", noise=NELBO, ar_weight=1.0, **options)

    def corrupt(self, batch: Batch, pattern: Pattern) -> list[Masked]:
        return []

    def nelbo_masks(self, batch: Batch) -> list[Masked]:
        return []
