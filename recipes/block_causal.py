"""Block-causal conversion after Efficient-DLM (arXiv 2512.14067): block-wise attention with clean context."""

from __future__ import annotations

from typing import Any, Literal

from dlm_lightning.module import Recipe
from dlm_lightning.noise import Noise
from dlm_lightning.source import stated
from dlm_lightning.view import Pattern


class BlockCausal(Recipe):
    """Each noisy block sees itself in full and the context of all earlier blocks.

    Args:
        block_size: tokens per block, on the document's own positions; null takes what a diffusion source states.
        context: `clean`: a clean copy beside the noisy one, so that earlier blocks are read unmasked, as in decoding;
            `noisy`: one copy, earlier blocks are read as they are, masks included.
        context_rank: with clean context, whether the clean copy sees whole `block`s or is `causal` token by token,
            which an AR loss on it needs; prefill must follow the same rule.
        noise: which tokens are masked and what they weigh.
        **options: see `Recipe`.
    """

    def __init__(
        self,
        block_size: int | None = 16,
        context: Literal["clean", "noisy"] = "clean",
        context_rank: Literal["block", "causal"] = "block",
        noise: Noise = Noise(masking="tilted", weight="inverse_t"),
        **options: Any,
    ) -> None:
        size = block_size if block_size is not None else stated(options.get("source"), "block_size")
        super().__init__(Pattern(size, context, context_rank), noise=noise, **options)
