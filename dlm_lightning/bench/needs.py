"""What a step takes that no clock tells: tokens through the network, bytes, FLOPs.

Shapes: B rows, S tokens of a row of the view.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dlm_lightning.bench.arms import Arm, Step
from dlm_lightning.flops import FlopCounter, needed
from dlm_lightning.rehearsal import Ledger
from dlm_lightning.source import decoder_layers
from dlm_lightning.view import View

QUERIES = 1024  # tokens whose pairs are looked at together


def forward_tokens(step: Step, arm: Arm) -> int:
    """Tokens that the network computes in a step, those of every copy; makes one."""
    counted: list[int] = []
    body: Any = step.recipe.denoiser.network.base_model
    handle = body.register_forward_pre_hook(
        lambda _, __, given: counted.append(given["input_ids"].numel()), with_kwargs=True
    )
    step(arm)
    handle.remove()
    return sum(counted)


def peak_memory(step: Step, arm: Arm) -> int:
    """The most bytes that are alive at once in a step: weights, gradients, optimizer state and all else; makes one.

    On a GPU torch's allocator tells; on a CPU each storage is followed, so that what malloc keeps does not count.
    """
    step.optimizer.zero_grad()
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(step.device)
        step(arm)
        return torch.cuda.max_memory_allocated(step.device)
    state = [value for values in step.optimizer.state.values() for value in values.values()]
    denoiser, kept = step.recipe.denoiser, getattr(arm.loss, "kept", ())
    there = [*denoiser.parameters(), *denoiser.buffers(), *step.batch, *state, *kept]
    with _without_cycles(denoiser), Ledger() as ledger:
        for tensor in there:
            if isinstance(tensor, Tensor):
                tensor.detach()  # which shows the ledger what is there already
        step(arm)
    return sum(ledger.fullest)


@contextmanager
def _without_cycles(network: nn.Module) -> Iterator[None]:
    """Break the cycles that recomputation leaves under a dispatch mode whenever a gradient is there (see `Ledger`)."""

    def collect(_: Tensor) -> None:
        gc.collect()

    gc.collect()
    gc.freeze()
    handles = [p.register_post_accumulate_grad_hook(collect) for p in network.parameters() if p.requires_grad]
    try:
        yield
    finally:
        gc.unfreeze()
        for handle in handles:
            handle.remove()


def needed_flops(step: Step, arm: Arm) -> float:
    """FLOPs of a step that the pattern needs: products of matrices, and attention of the pairs that see each other.

    Those of our own layout, for the baselines too: what they compute beyond it is no use of the device.
    """
    recipe, network = step.recipe, step.recipe.denoiser.network
    view, scored = arm.shown(recipe, step.batch)
    view, scored = view.to(step.device), scored.to(step.device)
    recipe.denoiser.eval()  # without activation checkpointing, under which the last layer is computed for all tokens
    with torch.no_grad(), step.precision.forward_context(), FlopCounter() as counter:
        recipe.denoiser(view, scored.index_N, scored.target_N)
    recipe.denoiser.train()
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    config = network.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 4 * pairs(view, recipe.predicate) * heads * size * len(decoder_layers(network))
    return needed(products + attention, network)


def pairs(view: View, predicate: Any) -> int:
    """How many pairs of tokens see each other, counted piece by piece."""
    B, S = view.ids_BS.shape
    pieces = ((slice(b, b + 1), slice(first, first + QUERIES)) for b in range(B) for first in range(0, S, QUERIES))
    return sum(int(predicate(view[row, part, None], view[row, None, :]).sum()) for row, part in pieces)
