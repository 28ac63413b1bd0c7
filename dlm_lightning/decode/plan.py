"""A decoder: which parts it is made of."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from dlm_lightning.decode.reuse import Prefix, Reuse
from dlm_lightning.decode.sampling import Sampling
from dlm_lightning.decode.scorer import SCORERS
from dlm_lightning.decode.selector import Selector, Threshold
from dlm_lightning.decode.stopper import Stopper
from dlm_lightning.denoiser import Denoiser
from dlm_lightning.view import AUTOREGRESSIVE, Pattern


@dataclass(frozen=True)
class Plan:
    """How to decode.

    Args:
        scorer: how sure the network is of a token: its probability (`confidence`), less that of the next one
            (`margin`), or how little is open in all (`entropy`).
        selector: which masks are filled in by a forward.
        cache: which tokens a forward shows, and which it only looks at.
        stopper: when a row ends.
        sampling: which token a mask becomes.
        block_size: tokens per block; null takes the model's. A model without blocks fills its document block by block.
        part_size: tokens per part of a block, which are filled in one part after another; null for one part.
    """

    scorer: Literal["confidence", "margin", "entropy"] = "confidence"
    selector: Selector = field(default_factory=Threshold)
    cache: Reuse = field(default_factory=Prefix)
    stopper: Stopper = field(default_factory=Stopper)
    sampling: Sampling = field(default_factory=Sampling)
    block_size: int | None = None
    part_size: int | None = None

    def __post_init__(self) -> None:
        if self.scorer not in SCORERS:
            raise ValueError(f"scorer must be one of {', '.join(SCORERS)}, not {self.scorer}")
        for name in ("block_size", "part_size"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name} must be at least 1 or null, not {size}")

    def check(self, denoiser: Denoiser) -> None:
        """Raise ValueError, naming the reason, for a model that cannot be decoded so."""
        self.cache.check(denoiser, denoiser.pattern)
        if denoiser.pattern == AUTOREGRESSIVE and (self.block_size or 1) > 1:
            raise ValueError(
                f"block_size {self.block_size} lets tokens see later ones, which an AR source never did; it needs a "
                "conversion"
            )
        size = self.block_size or self.cache.pattern(denoiser.pattern).block_size
        if self.part_size and size and size % self.part_size:
            raise ValueError(f"part_size {self.part_size} does not divide the block size {size}")

    def pattern(self, pattern: Pattern) -> Pattern:
        """The pattern to decode with, for a model of this one."""
        pattern = self.cache.pattern(pattern)
        return replace(pattern, block_size=self.block_size) if self.block_size and pattern.block_size else pattern
