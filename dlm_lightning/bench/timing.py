"""Arms timed in turns: each turn runs every arm once, so that what slows a machine down for a while slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

WARM_UP = 3  # turns that are not counted: caches, allocators and compilers settle


class Spread(NamedTuple):
    """The median of some values, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """How many times as long one arm took as another, turn by turn."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    turns: int,
    warm_up: int = WARM_UP,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each arm's step in each turn; every turn begins with another arm.

    Args:
        steps: by the names of their arms.
        turns: that are counted, after `warm_up` turns that are not.
        clock: seconds. wait: returns when the device has done what it was given (see `wait_for`).
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wait()
            began = clock()
            steps[name]()
            wait()
            if turn >= warm_up:
                seconds[name].append(clock() - began)
    return seconds


def wait_for(device: torch.device) -> Callable[[], None]:
    """What waits for a device; on a CPU a step is over when its call returns."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
