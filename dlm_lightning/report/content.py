"""What a report is made of: runs as they lie on disk, and arms, which are runs that differ in their seed alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from dlm_lightning import checkpoint, evaluation
from dlm_lightning.callbacks.weight_drift import FOLDER, TABLE
from dlm_lightning.evaluation import ONE_BY_ONE
from dlm_lightning.loggers import read_metrics
from dlm_lightning.runs import CONFIG, METRICS, ORIGIN
from dlm_lightning.tasks import PYTHON

PLAN = "comparison.json"  # of a comparison's folder
DECODER = "threshold 0.9"  # that arms are compared by where there is room for one
SEEDS = ("seed_everything", "data.seed")
PLACES = ("trainer.default_root_dir", "trainer.logger", "data.cache_dir", "data.num_workers")
COLORS = ("#3f7fd6", "#dd7a2b", "#2f9e6e", "#b25bc0", "#c2941f", "#d1495b", "#4aa5b5", "#8a6d5a")  # on white and black
GREY = "#8a8f98"
MODULES = {"attention": ("q", "k", "v", "qkv", "o"), "FFN": ("gate", "up", "gate_up", "down")}


@dataclass
class Run:
    """A run folder: what its recipe is called, what `dlm fit` was given, its flat config, and what `dlm eval` found."""

    path: Path
    recipe: str
    command: list[str]
    config: dict[str, Any]
    found: dict[str, Any]

    @property
    def seed(self) -> Any:
        """Of the data's order and noise."""
        return self.config.get("data.seed")

    def series(self, name: str) -> list[tuple[int, float]]:
        """(steps made, value) of a logged metric; Lightning's label is one less, and 0 before the first step."""
        found = read_metrics(self.path / METRICS, name)
        if name.startswith("val/") and found[:1] and found[0][0] == 0:
            return [found[0], *((label + 1, value) for label, value in found[1:])]
        return [(label + 1, value) for label, value in found]

    def last(self, name: str) -> float | None:
        """The last value of a logged metric."""
        values = self.series(name)
        return values[-1][1] if values else None

    def first(self, name: str) -> float | None:
        """The first value of a logged metric: of a validation, the one before the first step."""
        values = self.series(name)
        return values[0][1] if values else None

    def at(self, *keys: str) -> Any:
        """What `dlm eval` found under these keys."""
        value: Any = self.found
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the newest checkpoint."""
        kept = checkpoint.by_step(self.path / checkpoint.FOLDER)
        return self.found["step"] if self.found else max(0, kept[0][0]) if kept else None

    @property
    def unfinished(self) -> str:
        """How far it has come of what it is to make, or nothing."""
        wanted = self.config.get("trainer.max_steps")
        return f"{self.steps or 0:,} of {wanted:,} steps" if wanted and (self.steps or 0) < wanted else ""

    def tokens(self, kind: str) -> float | None:
        """Tokens of all steps: `forward` ones exactly, `data` and `scored` ones by their share in what was logged."""
        if not self.found or self.steps is None:
            return None
        forward = self.steps * self.found["work"]["forward_tokens_per_step"]
        logged = zip(*(self.series(f"speed/{k}_tokens_per_second") for k in (kind, "forward")), strict=True)
        shares = [of_kind / of_all for (_, of_kind), (_, of_all) in logged]
        return forward * statistics.fmean(shares) if shares else None

    @property
    def training_seconds(self) -> float | None:
        """Seconds of the steps, validation and checkpoints left out, by the rates that were logged."""
        rates = [rate for _, rate in self.series("speed/forward_tokens_per_second")]
        if not rates or not self.found or self.steps is None:
            return None
        per_step = self.found["work"]["forward_tokens_per_step"]
        return self.steps * statistics.fmean(per_step / rate for rate in rates)

    @cached_property
    def drift(self) -> list[dict[str, Any]]:
        """The rows of the drift table at its last step."""
        table = self.path / FOLDER / TABLE
        if not any(table.glob("*.parquet")):
            return []
        try:
            rows = pq.read_table(table)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{table} is damaged: {error}") from error
        return rows.filter(pc.field("step") == pc.max(rows["step"]).as_py()).to_pylist()

    def drifted(self, module: str, metric: str) -> float | None:
        """A drift metric of attention or FFN: the mean over its groups of matrices."""
        rows = [row for row in self.drift if row["name"] is None and row["metric"] == metric]
        values = [row["value"] for row in rows if row["group"] in MODULES[module]]
        return statistics.fmean(values) if values else None

    def drift_series(self, module: str, metric: str) -> list[tuple[int, float]]:
        """The same over the steps."""
        by_step: dict[int, list[float]] = {}
        for group in MODULES[module]:
            for step, value in self.series(f"drift/{group}/{metric}"):
                by_step.setdefault(step, []).append(value)
        return [(step, statistics.fmean(values)) for step, values in sorted(by_step.items())]

    def accuracy(self, task: str | None = None, decoder: str = DECODER, name: str = "exact") -> float | None:
        """The share of answers that are right, of a task or the mean over all generated ones."""
        rows = [row for row in self.rows(decoder) if name in row and row["count"]]
        chosen = [row for row in rows if row["task"] == task or (task is None and row["task"] != PYTHON)]
        return statistics.fmean(row[name] / row["count"] for row in chosen) if chosen else None

    def per_forward(self, task: str | None = None, decoder: str = DECODER) -> float | None:
        """TPF over the questions of a task or of all of them."""
        chosen = [row for row in self.rows(decoder) if task in (row["task"], None) and row["forwards"]]
        return sum(r["tokens"] for r in chosen) / sum(r["forwards"] for r in chosen) if chosen else None

    def rows(self, decoder: str) -> list[dict[str, Any]]:
        """The records of a decoder; an autoregressive model has its own instead of any."""
        return [row for row in self.found.get("tasks") or [] if row["decoder"] in (decoder, ONE_BY_ONE)]


@dataclass
class Arm:
    """Runs that differ in their seed alone, and what tells them from the other arms of the same recipe."""

    title: str
    runs: list[Run]
    color: str = ""
    differing: dict[str, Any] = field(default_factory=dict)

    def values(self, measure: Callable[[Run], float | None]) -> list[float]:
        """A number of each run that has it."""
        found = (measure(run) for run in self.runs)
        return [value for value in found if value is not None]

    @property
    def pattern(self) -> dict[str, Any]:
        """As `dlm eval` noted it."""
        return next((run.found["pattern"] for run in self.runs if run.found), {})

    @property
    def label(self) -> str:
        """Its block size and token shift, in words."""
        if not self.pattern:
            return "not measured"
        if self.pattern["block_size"] == 1:
            return "causal"
        size = self.pattern["block_size"]
        blocks = f"block {size}, {self.pattern['context']} context" if size else "whole document"
        return blocks + (", token shift" if self.pattern["shift"] == "next_token" else "")


def expand(folders: Sequence[str]) -> list[Path]:
    """Run folders, or the runs of comparisons; FileNotFoundError for a folder that holds neither."""
    found: list[Path] = []
    for name in folders:
        folder = Path(name).expanduser()
        inside = folder / "runs" if (folder / "runs").is_dir() else folder
        candidates = [folder] if (folder / CONFIG).is_file() else _by_arm(inside) if inside.is_dir() else []
        runs = [path for path in candidates if (path / CONFIG).is_file() and (path / ORIGIN).is_file()]
        if not runs:
            raise FileNotFoundError(f"{name} is neither a run folder nor a folder of runs")
        found += [run for run in runs if run not in found]
    return found


def _by_arm(folder: Path) -> list[Path]:
    """What lies in a folder of runs, a comparison's in the order of its arms."""
    named = folder.parent / PLAN
    arms = list(read_json(named).get("steps", {})) if named.is_file() else []

    def place(path: Path) -> tuple[int, str]:
        arm = path.name.rpartition("-")[0]
        return arms.index(arm) if arm in arms else len(arms), path.name

    return sorted(folder.iterdir(), key=place)


def read_run(path: Path) -> Run:
    """A run folder; ValueError, naming the file, for what cannot be read."""
    try:
        config = flat(yaml.safe_load((path / CONFIG).read_text()))
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        raise ValueError(f"{path / CONFIG} is damaged: {' '.join(str(error).split())}") from error
    origin = read_json(path / ORIGIN)
    if missing := {"recipe", "path", "origin"} - origin.keys():
        raise ValueError(f"{path / ORIGIN} is damaged: it has no {sorted(missing)[0]}")
    file, typed_in = Path(origin["path"]), origin.get("cwd", Path.cwd())
    file = file.relative_to(typed_in) if file.is_relative_to(typed_in) else file
    named = origin["recipe"] if origin["origin"] == "dlm_lightning" else str(file)
    command = [named, *origin.get("overrides", [])]
    return Run(path, origin["recipe"], command, config, evaluation.load(path) or {})


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file; ValueError, naming it, if there is none."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return found


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config by dotted keys, `init_args` left out."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict) and value:
            found |= flat(value, name)
        else:
            found[name] = value
    return found


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Arms in the order of their first runs, causal ones last; those of one recipe are told apart by what differs."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        rest = {key: value for key, value in run.config.items() if not key.startswith((*SEEDS, *PLACES))}
        grouped.setdefault(json.dumps([run.recipe, rest], sort_keys=True, default=str), []).append(run)
    arms = [Arm(members[0].recipe, sorted(members, key=lambda run: str(run.seed))) for members in grouped.values()]
    arms.sort(key=lambda arm: arm.label == "causal")
    differing = differing_keys(arms)
    for arm in arms:
        arm.differing = {key: arm.runs[0].config.get(key) for key in differing}
    for title in {arm.title for arm in arms}:
        same = [arm for arm in arms if arm.title == title]
        telling = differing_keys(same)[:3]
        for arm in same if telling else []:
            values = (f"{key.split('.', 1)[-1]}={arm.runs[0].config.get(key)}" for key in telling)
            arm.title = f"{title} ({', '.join(values)})"
    for number, arm in enumerate(arms):
        arm.color = GREY if arm.label == "causal" else COLORS[number % len(COLORS)]
    return arms


def differing_keys(arms: Sequence[Arm]) -> list[str]:
    """The config keys in which some of the arms differ; not those that name a seed or a place."""
    configs = [arm.runs[0].config for arm in arms]
    keys = sorted({key for config in configs for key in config if not key.startswith((*SEEDS, *PLACES))})
    return [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]
