"""`dlm compare`: the same work for several recipes and an AR control arm, over seeds; then everything is measured.

A comparison is a folder: `comparison.json`, which says what is compared, `runs/<arm>-<seed>/`, `logs/`, `report.html`
and `report.md`. Each run is a process of its own; what is finished is not made again, and what was cut off goes on.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dlm_lightning import catalog, checkpoint, evaluation, report, runs
from dlm_lightning.loggers import read_metrics
from dlm_lightning.report.content import PLAN, expand
from dlm_lightning.source import locate
from dlm_lightning.training import PLACEHOLDER, parse, quiet

log = logging.getLogger(__name__)
CONTROL, FOLDER = "control", Path("runs/compare")
EMBEDDED = "runs/ar_source"  # of the shipped recipes; trained if it is not there
TRIAL = 12  # steps by which a step's seconds are measured; the first third is not counted
POINTS = 4  # validations of a run whose length the budget decides
PATIENCE = 120  # seconds for which a run may still belong to the processes of a comparison that was killed
SAME = (  # keys that must not differ, or what is compared is not the pattern
    "model.source",
    "data.row_length",
    "data.batch_size",
    "data.val_rows",
    "data.seed",
    "data.paths",
    "data.val_paths",
    "data.tasks",
    "data.parts",
    "data.weights",
    "trainer.accumulate_grad_batches",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.precision",
)
LIKE = ("model.lr", "model.min_lr_ratio", "model.warmup_steps", "model.weight_decay", "model.betas", "model.lr_scale")


@dataclass(frozen=True)
class Budget:
    """How much work an arm gets: `steps` (of equal data tokens), `forward_tokens`, or `seconds` of training."""

    unit: str = "steps"
    amount: float | None = None  # None takes the recipes' own trainer.max_steps

    def __post_init__(self) -> None:
        if self.amount is not None and not self.amount > 0:
            raise ValueError(f"--{self.unit.replace('_', '-')} must be above 0, not {self.amount:g}")


@dataclass
class Comparison:
    """What is compared: recipes by the names of their arms, overrides for all, seeds, budget and steps per arm."""

    recipes: dict[str, str]
    overrides: list[str]
    seeds: int
    budget: dict[str, Any]
    prompts: int
    tasks: list[str] | None
    steps: dict[str, int] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        """What was asked for, without what was found out."""
        return {name: value for name, value in asdict(self).items() if name != "steps"}


def compare(
    recipes: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    seeds: int = 1,
    budget: Budget = Budget(),
    folder: str | None = None,
    jobs: int = 1,
    control: bool = True,
    tasks: list[str] | None = None,
    prompts: int = 32,
) -> Path:
    """Train and measure every arm with every seed, then write the report; returns its path.

    Repeated after it was cut off, or with more seeds, it makes what is missing. Raises ValueError for arms that do not
    do the same work, and RuntimeError naming the logs if a run fails, after all others are done.
    """
    quiet()
    for name, value in (("--seeds", seeds), ("--jobs", jobs)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    evaluation.check_asked(tasks, prompts)
    arms = _arms(recipes)
    _check_taken(list(arms.values()), overrides)
    wanted = Comparison(dict(arms), list(overrides), seeds, asdict(budget), prompts, tasks)
    parsed = {arm: _parsed(path, overrides) for arm, path in arms.items()}
    notes = check_same_work(parsed)
    place = _place(folder, wanted, control)
    with runs.held(place / ".lock", f"another process is comparing in {place}; wait for it, or end it"):
        work = _Work(place, wanted, jobs)
        work.embedded_source(parsed)
        if control:
            arms[CONTROL] = str(_control(place, next(iter(arms.values()))))
        for line in notes:
            log.info("note: %s", line)
        work.settle({arm: _parsed(path, overrides) for arm, path in arms.items()}, budget)
        of_arms = ", ".join(f"{arm} {steps:,}" for arm, steps in work.steps.items())
        log.info("%d runs in %s, by steps of each arm: %s", len(work.steps) * seeds, place, of_arms)
        failed = work.run_all()
        path = report.write(expand([str(place)]), place)
        if failed:
            raise RuntimeError(
                f"{len(failed)} of the runs failed, the first one by {failed[0]}; the report has the others"
            )
    return path


def _arms(recipes: Sequence[str]) -> dict[str, str]:
    """Recipes by the names of their arms; a YAML is named by its full path."""
    arms: dict[str, str] = {}
    for recipe in recipes:
        found = catalog.find(recipe)
        if found.name in arms or found.name == CONTROL:
            raise ValueError(f"two arms would be called {found.name}; rename one of the YAMLs")
        arms[found.name] = str(found.path) if recipe != found.name else recipe
    return arms


def _parsed(recipe: str, overrides: Sequence[str]) -> Any:
    """A recipe as LightningCLI resolves it."""
    found = catalog.find(recipe)
    catalog.make_importable(found)
    own = taken(recipe, overrides)
    return parse(catalog.compose(found.path), [*own, "--trainer.logger=false"], PLACEHOLDER)


def taken(recipe: str, overrides: Sequence[str]) -> list[str]:
    """Those overrides whose key a recipe takes: a block size is nothing to a pattern without blocks."""
    found = catalog.find(recipe)
    catalog.make_importable(found)
    keys = [word.lstrip("-").partition("=")[0].split(".") for word in overrides]
    of_model = {key[1]: None for key in keys if key[0] == "model" and key[1:]}
    known = catalog.taken(catalog.compose(found.path)["model"]["class_path"], of_model)
    foreign = [key[0] == "model" and key[1] not in known for key in keys]
    return [word for word, other in zip(overrides, foreign, strict=True) if not other]


def _check_taken(recipes: Iterable[str], overrides: Sequence[str]) -> None:
    """ValueError for an override that no arm takes."""
    left = [word for word in overrides if not any(word in taken(recipe, overrides) for recipe in recipes)]
    if left:
        raise ValueError(f"none of the recipes takes {left[0].lstrip('-').partition('=')[0]}")


def check_same_work(parsed: dict[str, Any]) -> list[str]:
    """Notes on settings of the optimizer that differ among arms; ValueError if source, data or devices do."""
    first, *others = parsed
    notes = []
    for other in others:
        for key in (*SAME, *LIKE):
            a, b = (_value(parsed[arm].config, key) for arm in (first, other))
            if a == b:
                continue
            line = f"{key} is {a} in {first} and {b} in {other}"
            if key in SAME:
                raise ValueError(f"the arms do not do the same work: {line}")
            notes.append(line)
        kinds = [parsed[arm].config.data.class_path for arm in (first, other)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"the arms do not do the same work: data is {kinds[0]} in {first} and {kinds[1]} in {other}"
            )
    return notes


def _value(config: Any, key: str) -> Any:
    section, name = key.split(".")
    values = getattr(config, section)
    values = values if section == "trainer" else values.init_args
    return values.get(name)


def _place(folder: str | None, wanted: Comparison, control: bool) -> Path:
    """The comparison's folder: a named one, an unfinished one that asks for the same, or a new number."""
    request = {**wanted.request(), "control": control}
    if folder is None:
        numbered = sorted((p for p in FOLDER.glob("*") if p.name.isdigit()), key=lambda p: int(p.name), reverse=True)
        for place in numbered:
            if not (place / report.HTML).is_file() and _request(place) == request:
                return place.resolve()
        place = FOLDER / str(int(numbered[0].name) + 1 if numbered else 1)
    else:
        place = Path(folder).expanduser()
        if place.is_file() or (place.is_dir() and any(place.iterdir()) and not (place / PLAN).is_file()):
            raise FileExistsError(f"--run {folder} already holds something else; name a new folder")
        if (found := _request(place)) is not None:
            for key, value in request.items():
                if key != "seeds" and found.get(key) != value:
                    raise ValueError(
                        f"--run {folder} holds a comparison with {key} {found.get(key)}, not {value}; name a new folder"
                    )
    place.mkdir(parents=True, exist_ok=True)
    kept = json.loads((place / PLAN).read_text()) if (place / PLAN).is_file() else {}
    _write(place / PLAN, {**kept, **request})
    return place.resolve()


def _request(place: Path) -> dict[str, Any] | None:
    if not (place / PLAN).is_file():
        return None
    found = json.loads((place / PLAN).read_text())
    return {name: value for name, value in found.items() if name not in ("steps", "step_seconds", "argv")}


def _control(place: Path, first: str) -> Path:
    """The control arm's YAML: the first recipe's data, optimizer and trainer under the AR source's causal pattern."""
    path = place / f"{CONTROL}.yaml"
    own = {
        "extends": [str(catalog.find(first).path)],
        "model": {"class_path": "dlm_lightning.recipes.ar_source.ArSource", "init_args": {"config": None}},
    }
    path.write_text("# The AR control arm: the same extra training, causal.\n" + yaml.safe_dump(own, sort_keys=False))
    return path


def _write(path: Path, content: Any) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(beside, path)


class _Work:
    """The processes of a comparison."""

    def __init__(self, place: Path, wanted: Comparison, jobs: int) -> None:
        self.place, self.wanted, self.jobs = place, wanted, jobs
        self.steps: dict[str, int] = {}
        self.own_length = wanted.budget["amount"] is None
        (place / "logs").mkdir(exist_ok=True)
        (place / "runs").mkdir(exist_ok=True)
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen] = set()
        self._stopped = False

    def embedded_source(self, parsed: dict[str, Any]) -> None:
        """Train the shipped recipes' source if it is asked for and not there."""
        source = next(iter(parsed.values())).config.model.init_args.get("source")
        if source != EMBEDDED:
            return
        with suppress(FileNotFoundError):
            locate(source)
            return
        log.info("the recipes' source, %s, is not there yet; it is trained first", EMBEDDED)
        self._dlm(["fit", "ar_source"], "ar_source")

    def settle(self, parsed: dict[str, Any], budget: Budget) -> None:
        """How many steps each arm makes; kept, so that a comparison that goes on makes as many."""
        kept = json.loads((self.place / PLAN).read_text())
        self.steps = kept.get("steps", {})
        if set(self.steps) >= set(parsed):
            return
        own = {arm: cli.config.trainer.max_steps for arm, cli in parsed.items()}
        seconds: dict[str, float] = {}
        if budget.amount is None:
            if len(set(own.values())) > 1:
                raise ValueError(f"the arms have different trainer.max_steps, {own}; give --steps")
            self.steps = own
        elif budget.unit == "steps":
            self.steps = dict.fromkeys(parsed, round(budget.amount))
        elif budget.unit == "forward_tokens":
            self.steps = {arm: round(budget.amount / _per_step(cli)) for arm, cli in parsed.items()}
        else:
            seconds = self._step_seconds(parsed)
            self.steps = {arm: round(budget.amount / seconds[arm]) for arm in parsed}
        if short := [arm for arm, steps in self.steps.items() if steps < 1]:
            raise ValueError(f"the budget is less than a step of {short[0]}")
        _write(self.place / PLAN, {**kept, "steps": self.steps, "step_seconds": seconds})

    def _step_seconds(self, parsed: dict[str, Any]) -> dict[str, float]:
        """Seconds of an optimizer step of each arm, by a short run that is thrown away."""

        def trial(arm: str) -> float:
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / arm
                options = [f"trainer.max_steps={TRIAL}", "trainer.limit_val_batches=0", "trainer.log_every_n_steps=4"]
                callbacks = "trainer.callbacks=[{class_path: dlm_lightning.callbacks.throughput.Throughput}]"
                self._dlm(["fit", self._recipe(arm), *self._overrides(arm), *options, callbacks, "--run", run], "trial")
                rates = read_metrics(run / runs.METRICS, "speed/forward_tokens_per_second")
            per_step = _per_step(parsed[arm])
            return statistics.median(per_step / rate for step, rate in rates if step >= TRIAL // 3)

        log.info("the budget is in seconds: %d steps of each arm say how many there can be", TRIAL)
        with ThreadPoolExecutor(self.jobs) as pool:
            return dict(zip(parsed, pool.map(trial, parsed), strict=True))

    def _recipe(self, arm: str) -> str:
        return str(self.place / f"{CONTROL}.yaml") if arm == CONTROL else self.wanted.recipes[arm]

    def _overrides(self, arm: str) -> list[str]:
        return taken(self._recipe(arm), self.wanted.overrides)

    def run_all(self) -> list[str]:
        """Train and measure what is missing; returns the logs of what failed."""
        todo = [(arm, seed) for seed in range(self.wanted.seeds) for arm in self.steps]
        done = 0

        def one(pair: tuple[str, int]) -> str | None:
            nonlocal done
            arm, seed = pair
            name = f"{arm}-{seed}"
            began = time.perf_counter()
            try:
                made = self._train(arm, seed)
                made = self._measure(self.place / "runs" / name, name) or made
            except RuntimeError as error:
                if not self._stopped:
                    log.info("%s, seed %d failed: %s", arm, seed, error)
                return str(self.place / "logs" / f"{name}.log")
            with self._lock:
                done += 1
                how = f"in {time.perf_counter() - began:.0f} s" if made else "was there"
                log.info("[%d of %d] %s, seed %d: %d steps, %s", done, len(todo), arm, seed, self.steps[arm], how)
            return None

        pool = ThreadPoolExecutor(self.jobs)
        previous = signal.signal(signal.SIGTERM, _terminated) if _in_main_thread() else None
        try:
            results = list(pool.map(one, todo))
        except BaseException:
            self._stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
        return [path for path in results if path]

    def _train(self, arm: str, seed: int) -> bool:
        """Begin or continue a run, unless it is finished; whether there was anything to do."""
        name, steps = f"{arm}-{seed}", self.steps[arm]
        run = self.place / "runs" / name
        if run.is_dir() and not (run / runs.CONFIG).is_file():
            shutil.rmtree(run)  # cut off before it began
        if not run.is_dir():
            words = [f"seed_everything={seed}", f"data.seed={seed}", f"trainer.max_steps={steps}"]
            if not self.own_length:
                words.append(f"trainer.val_check_interval={max(1, steps // POINTS)}")
            self._dlm(["fit", self._recipe(arm), *self._overrides(arm), *words, "--run", run], name)
            return True
        newest = checkpoint.newest(run)
        if newest is not None and checkpoint.load(newest / checkpoint.STATE)["global_step"] >= steps:
            return False
        _wait_until_free(run)
        self._dlm(["resume", run], name)
        return True

    def _measure(self, run: Path, name: str) -> bool:
        if evaluation.load(run) is not None:
            return False
        tasks = ["--tasks", *self.wanted.tasks] if self.wanted.tasks else []
        self._dlm(["eval", run, "--prompts", self.wanted.prompts, *tasks], name)
        return True

    def _dlm(self, words: Sequence[object], name: str) -> None:
        """A command in a process of its own, which ends with this one; RuntimeError with its last line if it fails."""
        command = [sys.executable, "-m", "dlm_lightning.cli", *map(str, words)]
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        environment.pop(runs.RUN_VARIABLE, None)
        path = self.place / "logs" / f"{name}.log"
        with path.open("a") as file:
            file.write(f"$ dlm {' '.join(map(str, words))}\n")
            file.flush()
            with self._lock:
                if self._stopped:
                    raise RuntimeError("stopped")
                child = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # a terminal's Ctrl-C comes here, and is handed on once
                    preexec_fn=_end_with(os.getpid()),
                )
                self._children.add(child)
            code = child.wait()
        with self._lock:
            self._children.discard(child)
        if code:
            lines = path.read_text(errors="replace").splitlines()
            said = [line for line in lines if line.startswith("dlm: ")]
            raise RuntimeError(said[-1].removeprefix("dlm: ") if said else f"exit code {code}, see {path}")

    def _stop(self) -> None:
        """Ask all processes to save and leave, and wait for them."""
        with self._lock:
            self._stopped = True
            children = list(self._children)
        for child in children:
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)


def _per_step(cli: Any) -> int:
    """Forward tokens of an optimizer step."""
    data, trainer = cli.datamodule, cli.trainer
    rows = data.batch_size * trainer.accumulate_grad_batches * trainer.num_devices * trainer.num_nodes
    return rows * data.row_length * cli.model.copies


def _wait_until_free(run: Path) -> None:
    """Wait for a process of a comparison that was killed to leave its run."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with runs.claimed(run):
                return
        except ValueError:
            if time.monotonic() > until:
                raise RuntimeError(f"another process is still training in {run}") from None
            time.sleep(0.5)


def _end_with(parent: int) -> Callable[[], None] | None:
    """What a child runs first, so that it is asked to stop when this process is gone, however that ends; Linux only."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return ask


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _terminated(*_: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)
