"""Turns and their statistics, by a clock that the tests turn."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning.bench.timing import Spread, ratio, take_turns, wait_for


class Clock:
    """Stands still but for what a step adds."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now

    def step(self, name, seconds):
        def run():
            self.order.append(name)
            self.now += seconds * len(self.order)

        return run


def test_every_turn_runs_every_arm_once_and_begins_with_another():
    clock = Clock()
    take_turns({name: clock.step(name, 1) for name in "abc"}, 3, warm_up=1, clock=clock)
    assert "".join(clock.order) == "abc" + "bca" + "cab" + "abc"


def test_the_seconds_are_those_of_the_counted_turns():
    clock = Clock()
    seconds = take_turns({"a": clock.step("a", 1), "b": clock.step("b", 10)}, 2, warm_up=1, clock=clock)
    assert clock.order == ["a", "b", "b", "a", "a", "b"]
    assert seconds == {"a": [4, 5], "b": [30, 60]}


def test_the_device_is_waited_for_before_and_after_each_step():
    said = []
    steps = {name: lambda name=name: said.append(name) for name in "ab"}
    take_turns(steps, 1, warm_up=0, wait=lambda: said.append("wait"))
    assert said == ["wait", "a", "wait", "wait", "b", "wait"]


def test_a_cpu_is_not_waited_for():
    assert wait_for(torch.device("cpu"))() is None


@pytest.mark.parametrize(
    ("values", "expected"), [([3], (3, 3, 3)), ([1, 3], (2, 1.5, 2.5)), ([5, 1, 2, 3, 4], (3, 2, 4))]
)
def test_a_spread_is_the_median_and_the_quartiles(values, expected):
    assert Spread.of(values) == expected


def test_a_ratio_is_taken_turn_by_turn():
    slow_turns, fast = [2, 2, 200], [1, 1, 100]  # the third turn was disturbed, both arms alike
    assert ratio(slow_turns, fast) == (2, 2, 2)
