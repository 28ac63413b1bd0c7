"""A CSV logger that survives a resume."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only


class _Writer(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Lightning's own writer deletes the file of an earlier segment here."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Lightning's own writer truncates the file first; a kill after that would lose all rows."""
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        _replace(path, fieldnames, rows)


def read_metrics(path: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of every row of a `metrics.csv` that holds a metric; none if there is no such file."""
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]
    except (ValueError, KeyError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _replace(path: Path, names: list[str], rows: list[dict[str, str]]) -> None:
    """Write a table in place of another, whole or not at all."""
    beside = path.with_suffix(".partial")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


class MetricsCSV(CSVLogger):
    """`metrics.csv` in the run folder: a row per log, continued by a resume where the checkpoint stood.

    Args:
        save_dir: the run folder.
        flush_logs_every_n_steps: how many logged steps are held back before they are written.
    """

    def __init__(self, save_dir: str, flush_logs_every_n_steps: int = 20) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)
        self._steps: int | None = 0

    def keep(self, steps: int) -> None:
        """Drop rows at and after `steps` once the first new one is logged; until then, a refusal loses nothing."""
        self._steps = steps

    @property
    def experiment(self) -> Any:
        if self._experiment is None and getattr(rank_zero_only, "rank", 0) == 0:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _Writer(log_dir=self.log_dir)
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        path = Path(self.save_dir) / "metrics.csv"
        if self._steps is not None and path.is_file():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                names = list(reader.fieldnames or [])
                rows = [row for row in reader if (row["step"] or "").isdigit() and int(row["step"]) < self._steps]
            self.experiment.metrics_keys = names if rows else []
            _replace(path, names, rows)
            if not rows:
                path.unlink()
        self._steps = None
        super().log_metrics(metrics, step)
