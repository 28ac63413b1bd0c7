"""What a step takes that no clock tells: tokens through the network, bytes, FLOPs."""

from __future__ import annotations

import gc
import itertools
import os
from typing import Any

import torch
from torch.autograd.profiler import profile

from dlm_lightning.bench.arms import Arm, Step
from dlm_lightning.flops import needed
from dlm_lightning.pattern_flops import forward_flops
from dlm_lightning.rehearsal import nbytes


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

    On a GPU torch's allocator tells; on a CPU each block that is taken or given back, so that what malloc keeps does
    not count, and what kernels and compiled layers take inside does.
    """
    step.optimizer.zero_grad()
    gc.collect()
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(step.device)
        step(arm)
        return torch.cuda.max_memory_allocated(step.device)
    state = [value for values in step.optimizer.state.values() for value in values.values()]
    denoiser, kept = step.recipe.denoiser, getattr(arm.loss, "kept", ())
    there = nbytes([*denoiser.parameters(), *denoiser.buffers(), *step.batch, *state, *kept])
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler prints when it starts and stops
    with profile(profile_memory=True) as watched:
        step(arm)
    blocks = [event for event in watched.kineto_results.events() if event.name() == "[memory]"]
    blocks.sort(key=lambda event: event.start_ns())
    return there + max(itertools.accumulate(event.nbytes() for event in blocks))


def needed_flops(step: Step, arm: Arm) -> float:
    """FLOPs of a step that the pattern needs (see `pattern_flops`).

    Those of our own layout, for the baselines too: what they compute beyond it is no use of the device.
    """
    view, scored = arm.shown(step.recipe, step.batch)
    with step.precision.forward_context():
        forward = forward_flops(step.recipe.denoiser, view.to(step.device), scored.to(step.device))
    return needed(forward, step.recipe.denoiser.network)
