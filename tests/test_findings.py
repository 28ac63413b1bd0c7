"""How the study judges its differences, and that every finding names arms and measures that are there."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from dlm_lightning import catalog

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return runpy.run_path(str(BENCHMARKS / "study.py"))


@pytest.mark.parametrize(
    ("a", "b", "sign", "verdict"),
    [
        ([1.0, 1.2, 0.9], [1.1, 1.0, 1.3], 1, "reproduces"),
        ([1.0, 1.2, 0.9], [1.1, 1.0, 1.3], -1, "contradicts"),
        ([-1.0, -1.2, -0.9], [-1.1, -1.0, -1.3], -1, "reproduces"),
        ([1.0, 1.2, 0.9], [1.1, 1.0, -0.1], 1, "not resolvable here"),  # seeds disagree, and the interval excludes 0
        ([0.1, 0.1, 0.1], [0.1, 0.1, 9.0], 1, "not resolvable here"),  # seeds agree, and the interval holds 0
        ([1.0, 1.2, 0.9], [], 1, "too few pairs yet"),
        ([], [], 1, "not measured"),
    ],
)
def test_a_verdict_needs_agreeing_seeds_and_an_interval_without_zero(study, a, b, sign, verdict):
    finding = study["Finding"]("1", "a claim", "block", "control", study["ONE"], sign, "none")
    assert study["judge"](finding, {"qwen3": a, "llama": b})["verdict"] == verdict


def test_every_finding_names_arms_and_measures_that_are_there(study):
    arms = {path.stem for part in study["PARTS"] for path in (BENCHMARKS / "study" / part).glob("*.yaml")}
    assert arms == {arm for of_part in study["PARTS"].values() for arm in of_part}
    names = [finding.name for finding in study["FINDINGS"]]
    assert len(set(names)) == len(names)
    for finding in study["FINDINGS"]:
        assert {finding.arm, finding.than} <= arms
        assert {finding.measure, finding.against or finding.measure} <= study["MEASURES"].keys()


def test_every_arm_can_be_trained_on_the_data_that_all_have(study):
    for part, arms in study["PARTS"].items():
        for arm in arms:
            config = catalog.compose(BENCHMARKS / "study" / part / f"{arm}.yaml")
            size = config["model"]["init_args"].get("block_size")
            filled = [
                its["init_args"]["multiple"]
                for its in config["data"]["init_args"]["parts"]
                if "multiple" in its.get("init_args", {})
            ]
            assert filled and (size is None or all(multiple % size == 0 for multiple in filled)), arm


def test_sittings_add_up_and_the_one_with_more_runs_goes_before(study):
    name, bound = study["FINDINGS"][0].name, study["BOUND"]
    arm = {bound: [2.0, 2.1, 2.2]}
    old = {"sources": {}, "arms": {"qwen3": {"block": arm}}, "findings": {name: {"by_source": {"qwen3": [1, 2, 3]}}}}
    new = {
        "sources": {},
        "arms": {"qwen3": {"block": {bound: [3.0]}}, "llama": {"block": {bound: [4.0]}}},
        "differences": {name: {"qwen3": [9], "llama": [4]}},
    }
    joined = study["joined"](old, new)
    assert joined["arms"] == {"qwen3": {"block": arm}, "llama": {"block": {bound: [4.0]}}}
    assert joined["differences"][name] == {"qwen3": [1, 2, 3], "llama": [4]}
