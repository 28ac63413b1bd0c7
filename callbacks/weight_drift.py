"""Measures how far the network has moved from its AR source: numbers, a table, and a picture per step."""

from __future__ import annotations

import gc
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from dlm_lightning import lora
from dlm_lightning.drift import Drift, by_group, measure, pool, rows
from dlm_lightning.module import Recipe

log = logging.getLogger(__name__)
FOLDER, TABLE = "drift", "drift.parquet"
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("name", pa.string()),
        ("layer", pa.int64()),
        ("group", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("numel", pa.int64()),
    ]
)
COLUMNS = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "norm", "other")  # of the picture, left to right
OUTSIDE = {"embedding": "embedding", "norm": "last norm", "other": "other", "head": "head"}  # of the layers, downwards


class WeightDrift(L.Callback):
    """Measures the weight drift from the source every so many optimizer steps and after the last one.

    Logs `drift/<group>/<metric>` beside the step's `train/loss`, where a group is q, k, v, o, gate, up, down, norm,
    embedding, head (qkv and gate_up where they are fused; other) over all layers, and a metric is:
    mean_abs: mean |ΔW|, the paper's average difference (arXiv 2512.14067, figure 4).
    rel_fro: ‖ΔW‖_F / ‖W0‖_F.
    cosine: between W and W0.
    w1: Wasserstein-1 distance between the distributions of the values of W and W0.
    stable_rank: ‖ΔW‖_F² / ‖ΔW‖_2², the mean over matrices.

    Logs `drift/seconds_share` at the end: its own share of the training time.

    Keeps `drift/drift.parquet` in the run, a folder of a file per measured step that Parquet readers take as one table:
    a row per step, parameter and metric, and rows without a name for whole groups; and `drift/step_000100.png`, a map
    of rel_fro. It holds no state: a continued run measures the steps after its checkpoint again.

    Args:
        every_n_steps: optimizer steps between measurements.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"WeightDrift.every_n_steps must be at least 1, not {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._step = 0  # the last one that was looked at
        self._label = 0  # what the loggers call it
        self._began = self._seconds = 0.0
        self._measurements = 0

    def on_train_start(self, trainer: L.Trainer, recipe: Recipe) -> None:
        self._step, self._began, self._seconds, self._measurements = trainer.global_step, time.perf_counter(), 0.0, 0
        if recipe.source is None:
            log.info("WeightDrift measures nothing: a model trained from scratch has no source to drift from")
        elif trainer.is_global_zero:
            names = [name for name, _ in lora.named_parameters(recipe.denoiser.network) if name not in recipe.source]
            if names:
                log.warning(
                    f"WeightDrift leaves out {len(names)} parameters whose names the source's files do not have, "
                    f"{names[0]} the first"
                )
            for path in (Path(trainer.default_root_dir) / FOLDER).rglob("step_*"):
                measured = path.stem.removeprefix("step_")
                if measured.isdecimal() and int(measured) > trainer.global_step:
                    path.unlink()

    def on_train_batch_end(self, trainer: L.Trainer, recipe: Recipe, *_: Any) -> None:
        """Not at validation, where FSDP2 leaves the root's parameters (embedding, head, last norm) gathered."""
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == trainer.max_steps
        if recipe.source is None or step == self._step or not due:
            return
        began = time.perf_counter()
        self._step, self._label = step, trainer.fit_loop.epoch_loop._batches_that_stepped  # Lightning's own label
        drifts = measure(recipe.denoiser.network, recipe.source)
        if trainer.is_global_zero and drifts:
            self._keep(trainer, drifts)
        self._measurements += 1
        self._seconds += time.perf_counter() - began

    def on_train_end(self, trainer: L.Trainer, recipe: Recipe) -> None:
        if not self._measurements:
            return
        share = self._seconds / (time.perf_counter() - self._began)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics({"drift/seconds_share": share}, step=self._label)
        log.info(
            f"WeightDrift: {self._measurements} measurements in {self._seconds:.2f} s, {share:.2%} of the training time"
        )

    def _keep(self, trainer: L.Trainer, drifts: list[Drift]) -> None:
        folder = Path(trainer.default_root_dir) / FOLDER
        (folder / TABLE).mkdir(parents=True, exist_ok=True)
        groups = by_group(drifts)
        metrics = {f"drift/{group}/{metric}": value for group in groups for metric, value in groups[group].items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._label)
        new = [{"step": self._step, **row._asdict()} for row in rows(drifts)]
        name = f"step_{self._step:06d}"
        beside = folder / TABLE / f".{name}.partial"
        pq.write_table(pa.Table.from_pylist(new, SCHEMA), beside)
        os.replace(beside, folder / TABLE / f"{name}.parquet")
        with frees_cycles():
            picture(drifts, f"Drift from the source, step {self._step}", folder / f"{name}.png")


def last(path: str | Path) -> tuple[int, dict[str, dict[str, float]]]:
    """The last measured step of a `drift.parquet` and {group: {metric: value}} of the whole groups at that step."""
    table = pq.read_table(path, filters=pc.field("name").is_null())
    step = pc.max(table["step"]).as_py()
    groups: dict[str, dict[str, float]] = {}
    for row in table.filter(pc.field("step") == step).to_pylist():
        groups.setdefault(row["group"], {})[row["metric"]] = row["value"]
    return step, groups


@contextmanager
def frees_cycles() -> Iterator[None]:
    """Frees what was made inside and refers to itself, as matplotlib's figures do, without a look at older objects.

    Left to Python they would pile up until its rare collection of all objects, by tens of MiB.
    """
    enabled = gc.isenabled()
    gc.disable()  # nothing that is made inside becomes old
    try:
        yield
    finally:
        gc.collect(0)
        if enabled:
            gc.enable()


def picture(drifts: list[Drift], title: str, path: Path) -> None:
    """Draw ‖ΔW‖/‖W0‖ as a map, layers by groups; what belongs to no layer is a band across, in the network's order."""
    cells: dict[tuple[int | None, str], list[Drift]] = {}
    for drift in drifts:
        cells.setdefault((drift.layer, drift.group), []).append(drift)
    value = {cell: pool(members)["rel_fro"] for cell, members in cells.items()}
    groups = [group for group in COLUMNS if any(layer is not None and group == own for layer, own in cells)] or [""]
    layers = sorted({layer for layer, _ in cells if layer is not None})
    bands = {OUTSIDE[group]: [value[None, group]] * len(groups) for group in OUTSIDE if (None, group) in value}
    inside = {f"layer {layer}": [value.get((layer, group), math.nan) for group in groups] for layer in layers}
    lines = {name: bands[name] for name in bands if name == "embedding"} | inside | bands
    map_LG = np.array(list(lines.values()))
    finite = map_LG[np.isfinite(map_LG)]
    top = finite.max(initial=0) or 1.0

    height = 0.9 + len(lines) * (0.32 if len(lines) <= 16 else 0.2)
    width = 2.1 + 0.62 * len(groups)
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.95 / width, 0.4 / height, 0.62 * len(groups) / width, (height - 0.8) / height))
    # a square root, because norms move ten times less than matrices and the differences among these matter, too
    norm = PowerNorm(0.5, vmin=0, vmax=top)
    image = axes.imshow(map_LG, norm=norm, cmap="magma_r", aspect="auto", interpolation="nearest")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xticks(range(len(groups)), groups, fontsize=9)
    axes.set_yticks(range(len(lines)), list(lines), fontsize=9 if len(lines) <= 16 else 7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    first = list(lines).index(next(iter(inside), next(iter(lines))))
    axes.hlines(np.arange(1, len(lines)) - 0.5, -0.5, len(groups) - 0.5, color="white", linewidth=1)
    axes.vlines(np.arange(1, len(groups)) - 0.5, first - 0.5, first + len(layers) - 0.5, color="white", linewidth=1)
    for row, (name, numbers) in enumerate(lines.items() if len(lines) <= 16 else ()):
        for column, number in enumerate(numbers) if name in inside else [((len(groups) - 1) / 2, numbers[0])]:
            if math.isfinite(number):
                color = "white" if norm(number) > 0.55 else "black"
                axes.text(column, row, f"{number:.2g}", ha="center", va="center", fontsize=8, color=color)
    beside = figure.add_axes((1 - 0.95 / width, 0.4 / height, 0.12 / width, (height - 0.8) / height))
    bar = figure.colorbar(image, cax=beside)
    bar.set_label("‖ΔW‖ / ‖W₀‖", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    figure.savefig(path, pil_kwargs={"compress_level": 1})
