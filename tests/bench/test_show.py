"""What is shown of a measurement, and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from dlm_lightning.bench.record import Contest, Measured, Record
from dlm_lightning.bench.show import draw, spread, tables, thousands
from dlm_lightning.bench.timing import Spread


def measured(name, *seconds, forward=200, flops=None):
    return Measured(name, list(seconds), 100, 60, forward, 3 * 2**20, flops, loss=1.5)


@pytest.fixture
def contest():
    """`contest(value)`: three arms in three turns, of which the last was disturbed."""

    def make(value=None, flops=None):
        arms = [
            measured("ours", 0.2, 0.2, 2.0, flops=flops),
            measured("peers", 0.5, 0.6, 6.0, forward=400),
            measured("ar", 0.1, 0.1, 1.0, forward=100),
        ]
        return Contest("block_causal", value, "32-true", arms)

    return make


@pytest.fixture
def lines():
    """`lines(record)`: the tables as they are printed, line by line."""

    def show(record):
        console = Console(width=80, highlight=False)
        with console.capture() as capture:
            console.print(tables(record))
        return [line.rstrip() for line in capture.get().splitlines()]

    return show


def test_ratios_are_those_of_each_turn(contest):
    assert contest().ratios() == {
        "ours/ar": (pytest.approx(2), pytest.approx(2), pytest.approx(2)),
        "peers/ar": (pytest.approx(6), pytest.approx(5.5), pytest.approx(6)),
        "peers/ours": (pytest.approx(3), pytest.approx(2.75), pytest.approx(3)),
    }


def test_the_table_has_a_row_for_each_arm(contest, lines):
    found = lines(Record({"growth": None}, "a device", None, [contest()]))
    assert found[:2] == ["a device", "block_causal, 32-true"]
    assert [" ".join(line.split()) for line in found[3:]] == [
        "ours 200 ± 450 500 300 1,000 2.00 ± 0.00 – 3 MiB –",
        "peers 600 ± 1,375 167 100 667 6.00 ± 0.25 3.00 ± 0.12 3 MiB –",
        "ar 100 ± 225 1,000 600 1,000 – – 3 MiB –",
    ]


def test_mfu_is_shown_where_the_peak_is_known(contest, lines):
    found = lines(Record({"growth": None}, "a device", 1000.0, [contest(flops=100.0)]))
    assert [line.split()[-1] for line in found[3:]] == ["50.0%", "–", "–"]


def test_steps_of_seconds_leave_room_for_names(contest, lines):
    long = contest()
    arms = [replace(arm, seconds=[5 * s for s in arm.seconds]) for arm in long.arms]
    found = lines(Record({"growth": None}, "a device", None, [replace(long, arms=arms)]))
    assert [line.split()[0] for line in found[-3:]] == ["ours", "peers", "ar"]
    assert not any("…" in line for line in found)


def test_what_grows_is_named(contest, lines):
    found = lines(Record({"growth": ["documents", ["1", "2"]]}, "a device", None, [contest("1"), contest("2")]))
    assert [line for line in found if "block_causal" in line] == [
        f"block_causal, 32-true, documents={value}" for value in (1, 2)
    ]


def test_everything_is_kept(contest, tmp_path):
    record = Record({"recipes": ["block_causal"], "growth": None}, "a device", None, [contest()])
    record.save(tmp_path)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["device"] == "a device" and found["peak"] is None and found["threads"] == 1
    assert {"dlm_lightning", "torch", "lightning", "transformers"} == found["versions"].keys()
    [kept] = found["contests"]
    assert kept["precision"] == "32-true" and kept["ratios"]["ours/ar"]["median"] == pytest.approx(2)
    assert [arm["seconds"] for arm in kept["arms"]] == [[0.2, 0.2, 2.0], [0.5, 0.6, 6.0], [0.1, 0.1, 1.0]]


@pytest.mark.parametrize("growth", [None, ["data.row_length", ["16", "32", "64"]]])
def test_a_picture_is_drawn(growth, contest, tmp_path):
    values = growth[1] if growth else [None]
    draw(Record({"growth": growth}, "a device", None, [contest(value) for value in values]), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_are_short():
    assert [thousands(n) for n in (12.3, 9999, 12345, 2.5e6)] == ["12", "9,999", "12.3k", "2.5M"]
    assert spread(Spread(1.234, 1.2, 1.4)) == "1.23 ± 0.10"
