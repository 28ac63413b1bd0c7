"""A CSV logger that survives a resume."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only


class MetricsCSV(CSVLogger):
    """`metrics.csv` in the run folder: one row per logged step, continued by a resume where the checkpoint stood.

    Lightning's own logger deletes the file when a run is continued.

    Args:
        save_dir: the run folder.
        flush_logs_every_n_steps: how many logged steps are held back before they are written.
    """

    def __init__(self, save_dir: str, flush_logs_every_n_steps: int = 20) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)
        self._earlier: list[dict[str, Any]] = []

    @rank_zero_only
    def keep(self, steps: int) -> None:
        """Carry over the rows of the file that lie before `steps`; later ones will be logged again."""
        path = Path(self.save_dir) / "metrics.csv"
        if path.is_file():
            with path.open(newline="") as file:
                self._earlier = [row for row in csv.DictReader(file) if int(row["step"]) < steps]

    @property
    def experiment(self) -> Any:
        if self._experiment is None and getattr(rank_zero_only, "rank", 0) == 0:
            writer = super().experiment
            writer.metrics = [{k: v for k, v in row.items() if v != ""} for row in self._earlier]
            if writer.metrics:
                writer.save()
        return super().experiment
