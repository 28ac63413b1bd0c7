"""metrics.csv, and what becomes of it when a run is continued."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from dlm_lightning.loggers import MetricsCSV

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory")  # Lightning says what `keep` undoes


def log(folder: Path, *rows: tuple[int, dict[str, float]], keep: int | None = None) -> None:
    """One process's life: keep earlier rows if it continues a run, log, flush."""
    logger = MetricsCSV(str(folder))
    if keep is not None:
        logger.keep(keep)
    for step, values in rows:
        logger.log_metrics(values, step)
    logger.save()


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_lie_in_the_run_folder_itself(tmp_path):
    log(tmp_path, (0, {"loss": 2.5}), (1, {"loss": 2.0}))
    assert read(tmp_path) == [{"loss": "2.5", "step": "0"}, {"loss": "2.0", "step": "1"}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("steps", [0, 2, 5])
def test_a_resume_keeps_what_lies_before_it_and_logs_the_rest_anew(steps, tmp_path):
    log(tmp_path, *((step, {"loss": 10.0 + step}) for step in range(4)))
    log(tmp_path, (steps, {"loss": 99.0}), keep=steps)
    kept = [(str(step), str(10.0 + step)) for step in range(min(steps, 4))]
    assert [(row["step"], row["loss"]) for row in read(tmp_path)] == [*kept, (str(steps), "99.0")]


def test_earlier_rows_are_on_disk_as_soon_as_the_resumed_run_logs_though_later_ones_are_held_back(tmp_path):
    log(tmp_path, (0, {"loss": 1.0}), (1, {"loss": 2.0}))
    logger = MetricsCSV(str(tmp_path), flush_logs_every_n_steps=100)
    logger.keep(2)
    logger.log_metrics({"loss": 3.0}, 2)
    assert [row["loss"] for row in read(tmp_path)] == ["1.0", "2.0"]


def test_the_header_grows_over_a_resume(tmp_path):
    log(tmp_path, (0, {"loss": 1.0}))
    log(tmp_path, (1, {"loss": 2.0, "nelbo": 3.0}), (2, {"other": 4.0}), keep=1)
    assert [{name: value for name, value in row.items() if value} for row in read(tmp_path)] == [
        {"step": "0", "loss": "1.0"},
        {"step": "1", "loss": "2.0", "nelbo": "3.0"},
        {"step": "2", "other": "4.0"},
    ]


def test_a_resume_without_a_file_starts_one(tmp_path):
    log(tmp_path, (3, {"loss": 1.0}), keep=3)
    assert [row["step"] for row in read(tmp_path)] == ["3"]


def test_without_a_resume_an_earlier_file_is_replaced(tmp_path):
    """Why `keep` exists: this is what Lightning's logger does."""
    log(tmp_path, (0, {"loss": 1.0}))
    log(tmp_path, (7, {"loss": 2.0}))
    assert [row["step"] for row in read(tmp_path)] == ["7"]


def test_a_kill_while_the_header_grows_loses_no_row(tmp_path, monkeypatch):
    """New columns come with the first validation and the first drift."""
    log(tmp_path, (0, {"loss": 1.0}), (1, {"loss": 2.0}))
    before = read(tmp_path)
    logger = MetricsCSV(str(tmp_path))
    logger.keep(2)
    logger.log_metrics({"loss": 3.0, "nelbo": 4.0}, 2)

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(csv.DictWriter, "writerows", dies)
        logger.save()
    assert read(tmp_path) == before
