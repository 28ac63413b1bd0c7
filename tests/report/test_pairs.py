"""Paired differences: against a t interval that is known, and what is not resolvable."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dlm_lightning.report.content import Arm, Run
from dlm_lightning.report.pairs import Paired, paired


def arm(title: str, by_seed: dict[int, float | None]) -> Arm:
    runs = [Run(Path(title), title, [], {"data.seed": seed}, {"n": value}) for seed, value in by_seed.items()]
    return Arm(title, runs)


def number(run: Run) -> float | None:
    return run.at("n")


def test_the_interval_is_students():
    """2, 4, 6: standard error 2/√3, t = 4.303 with two degrees of freedom."""
    found = Paired([2.0, 4.0, 6.0])
    assert found.mean == 4 and found.half_width == pytest.approx(4.303 * 2 / math.sqrt(3))
    assert not found.resolved
    assert Paired([3.9, 4.0, 4.1]).resolved


def test_seeds_that_disagree_in_sign_resolve_nothing():
    assert not Paired([5.0] * 20 + [-0.001]).resolved
    assert abs(Paired([5.0] * 20 + [-0.001]).mean) > Paired([5.0] * 20 + [-0.001]).half_width


def test_one_pair_resolves_nothing():
    assert Paired([7.0]).half_width == math.inf and not Paired([7.0]).resolved


def test_differences_are_of_the_same_seed():
    found = paired(arm("a", {0: 1.0, 1: 5.0, 2: None}), arm("b", {1: 7.0, 0: 2.0, 2: 3.0, 9: 4.0}), number)
    assert sorted(found.differences) == [1.0, 2.0]
    assert paired(arm("a", {0: 1.0}), arm("b", {1: 1.0}), number) is None
