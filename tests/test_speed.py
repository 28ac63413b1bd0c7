"""The goals of benchmarks/speed.py: what is read off a record, and what is said of it. Nothing is timed."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from dlm_lightning.bench.timing import Spread
from dlm_lightning.plan import prepare

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "speed.py"


@pytest.fixture(scope="module")
def speed():
    spec = importlib.util.spec_from_file_location("speed", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"speed": module}):  # its dataclasses look themselves up
        spec.loader.exec_module(module)
    return module


def arm(name, seconds, memory=100, flops=None):
    kept = {"data": 1, "scored": 1, "forward": 1, "loss": 1.0}
    return {"name": name, "seconds": seconds, "memory": memory, "flops": flops, **kept}


@pytest.fixture
def record():
    """A record of complementary masks in two turns, as JSON holds it."""
    arms = [
        arm("ours", [2.0, 4.0], memory=40, flops=12.0),
        arm("peers", [5.0, 10.0]),
        arm("fair", [2.4, 4.8]),
        arm("ar", [1.0, 2.0], flops=4.0),
    ]
    contest = {"recipe": "complementary_mask", "value": None, "precision": "32-true", "arms": arms}
    found = {"device": "a device", "threads": 2, "versions": {"torch": "2"}, "peak": 10.0}
    return {**found, "contests": [{"recipe": "another"}, contest]}


def test_figures_are_read_off_a_record(speed, record):
    goals = [goal for goal in speed.GOALS["cpu"] if goal.recipe == speed.PAIR]
    found = [speed.reached(goal, record).median for goal in goals]
    assert found == pytest.approx([2.5, 1.2, 2.5, 2.0, 0.4])
    over, alone = (goal for goal in speed.GOALS["gpu"] if goal.what == "mfu" and goal.recipe == speed.PAIR)
    assert speed.reached(over, record) == pytest.approx((1.5, 1.5, 1.5))
    assert speed.reached(alone, record).median == pytest.approx((0.6 + 0.3) / 2)


def test_what_was_not_measured_is_said(speed, record):
    goals = speed.GOALS["cpu"]
    assert speed.verdict(goals[0], speed.reached(goals[0], None)) == "not measured"
    assert speed.reached(goals[0], record | {"contests": []}) is None
    assert speed.table("gpu", {}).count("not measured") == 4 * len(speed.GOALS["gpu"])
    assert "nothing yet" in speed.table("gpu", {})


@pytest.mark.parametrize(
    ("median", "most", "says"),
    [
        *((1.9, False, "missed"), (2, False, "reached"), (2.6, False, "stretch")),
        *((2.1, True, "missed"), (1.9, True, "reached"), (1.4, True, "stretch")),
    ],
)
def test_a_goal_is_missed_reached_or_surpassed(median, most, says, speed):
    goal = replace(speed.GOALS["cpu"][0], least=2.0, stretch=1.5 if most else 2.5, most=most)
    assert speed.verdict(goal, Spread(median, median - 0.1, median + 0.1)) == f"{median:.2f} ± 0.10 ({says})"


def test_the_table_names_the_device(speed, record):
    table = speed.table("cpu", {f"32-true/{speed.SMALL}": record})
    assert "| complementary: the peers' time over ours | 4,096 | ≥ 2 | ≥ 2.5 | 2.50 (stretch) |" in table
    assert table.endswith("Measured on: a device, threads: 2, torch 2.")


@pytest.mark.parametrize("part", ["cpu", "gpu"])
def test_each_figure_is_looked_up_where_it_is_kept(speed, part):
    asked = []

    class Kept(dict):
        def get(self, name):
            asked.append(name)

    speed.table(part, Kept())
    assert set(asked) == {*speed.requests(part, 1, []), *speed.drifts(part, [])}


def test_the_page_holds_what_was_measured(speed, tmp_path):
    page = speed.OUT / "speed.md"
    (tmp_path / "speed.md").write_text(page.read_text())
    if (speed.OUT / "speed.json").is_file():
        (tmp_path / "speed.json").write_text((speed.OUT / "speed.json").read_text())
    speed.write(tmp_path)
    assert (tmp_path / "speed.md").read_text() == page.read_text()


def test_the_models_have_the_sizes_that_the_page_says(speed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, request in speed.requests("cpu", 1, []).items():
        recipe = prepare(request.recipes[0], request.overrides).recipe
        config = recipe.model_config
        assert f"{config.vocab_size:,}" == name.split("/")[1]
        assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (192, 6, 32)
    for request in speed.requests("gpu", 1, []).values():
        words = [word for word in request.overrides if not word.startswith("trainer.accelerator")]
        config = prepare(request.recipes[0], words).recipe.model_config
        assert (config.vocab_size, config.head_dim, config.num_key_value_heads) == (151936, 128, 8)


def test_growth_is_a_row_for_each_value(speed, record):
    [_, contest] = record["contests"]
    grown = record | {"contests": [contest | {"value": value} for value in ("512", "1024")]}
    table = speed.table("growth", {"data.row_length": grown})
    assert [line for line in table.splitlines() if "1,024" in line] == [
        "| `data.row_length` | 1,024 | 3.00 ± 0.50 | 1.20 ± 0.00 | 2.00 ± 0.00 | 0 |"
    ]
    requests = speed.requests("growth", 1, [])
    assert {key: request.growth for key, request in requests.items()} == {
        key: (key, v) for key, v in speed.GROWTH.items()
    }


def test_the_drift_callbacks_share_is_that_of_ten_measurements_in_a_thousand_steps(speed, tmp_path, monkeypatch):
    """20 s of measurements beside 1,000 s of steps; and a real, small model is measured against its own source."""
    goal, memory = (next(g for g in speed.GOALS["gpu"] if g.what == what) for what in ("drift", "drift memory"))
    record = {"seconds": {"step": [1.0], "drift": [2.0]}, "memory": 3 * 2**20}
    assert speed.reached(goal, record).median == pytest.approx(100 * 20 / 1020)
    assert speed.reached(memory, record).median == 3
    monkeypatch.chdir(tmp_path)
    model = speed.shape({"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}, 8, 4, 2)
    words = [*model, "data.vocab_size=64", "data.row_length=32", "data.batch_size=1", "trainer.accelerator=cpu"]
    found = speed.drift([*words, "model.block_size=4"], 2)
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == {"step": 2, "drift": 2}
    assert found["memory"] is None and found["device"] and found["threads"]
