"""`dlm compare`: the same work for several recipes and an AR control arm, over seeds; then everything is measured.

A comparison is a folder: `comparison.json`, which says what is compared, `runs/<arm>-<seed>/`, `logs/`, `report.html`
and `report.md`. Each run is a process of its own; what is finished is not made again, and what was cut off goes on.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlm_lightning import checkpoint, evaluation, report, runs
from dlm_lightning.comparison.arms import (
    CONTROL,
    check_overrides,
    check_same_work,
    control,
    forward_tokens_per_step,
    named,
    parsed,
    taken,
)
from dlm_lightning.comparison.processes import Failed, Processes, alone
from dlm_lightning.comparison.request import Budget, Comparison
from dlm_lightning.loggers import read_metrics
from dlm_lightning.parsing import quiet
from dlm_lightning.report.content import expand
from dlm_lightning.source import locate

log = logging.getLogger(__name__)
EMBEDDED = "runs/ar_source"  # the shipped recipes' source, trained if it is not there
TRIAL = 12  # steps by which a step's seconds are measured; the first third is not counted
MOST_SEEDS, MOST_STEPS = 1000, 10**9
POINTS = 4  # validations of a run whose length the budget decides


def compare(
    recipes: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    seeds: int = 1,
    budget: Budget = Budget(),
    folder: str | None = None,
    jobs: int = 1,
    with_control: bool = True,
    tasks: list[str] | None = None,
    prompts: int = 32,
) -> Path:
    """Train and measure every arm with every seed, then write the report; returns its path.

    Repeated after it was cut off, or with more seeds, it makes what is missing. Raises ValueError for arms that do not
    do the same work, and RuntimeError naming a log if a run fails, after all others are done.
    """
    quiet()
    for name, value in (("--seeds", seeds), ("--jobs", jobs)):
        if not 1 <= value <= MOST_SEEDS:
            raise ValueError(f"{name} must be at least 1 and at most {MOST_SEEDS}, not {value}")
    evaluation.check_asked(tasks, prompts)
    check_overrides(overrides, budget.amount is not None)
    wanted = Comparison(named(recipes), list(overrides), seeds, budget, with_control, tasks, prompts)
    notes = check_same_work(parsed(wanted.recipes, overrides))
    place, wanted = wanted.within(folder)
    if wanted.seeds > seeds:
        notes.append(f"the comparison has {wanted.seeds} seeds already; it keeps them")
    new = not place.exists()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--run: {place} cannot be made: {error.strerror}") from error
    try:
        return _compare(wanted, notes, place, jobs)
    except ValueError:  # refused, before anything was trained
        if new:
            shutil.rmtree(place, ignore_errors=True)
        raise


def _compare(wanted: Comparison, notes: Sequence[str], place: Path, jobs: int) -> Path:
    with alone(place, wanted.cwd, jobs) as processes, contextlib.chdir(wanted.cwd):
        wanted.save(place)
        _train_embedded_source(wanted, processes)
        recipe_of = dict(wanted.recipes)
        if wanted.control:
            recipe_of[CONTROL] = str(control(place, next(iter(recipe_of.values()))))
        for line in notes:
            log.info("note: %s", line)
        if not set(wanted.steps) >= set(recipe_of):
            wanted = replace(wanted, steps=steps_of(recipe_of, wanted, processes))
            wanted.save(place)
        of_arms = ", ".join(f"{arm} {steps:,}" for arm, steps in wanted.steps.items())
        log.info("%d runs in %s, by steps of each arm: %s", len(recipe_of) * wanted.seeds, place, of_arms)
        failed = _run_all(recipe_of, wanted, place, processes)
        if len(failed) == len(recipe_of) * wanted.seeds:
            raise RuntimeError(f"all runs failed, the first one by {failed[0]}")
        path = report.write(expand([str(place)]), place)
        if failed:
            raise RuntimeError(f"{len(failed)} of the runs failed, the first one by {failed[0]}; {path} has the others")
    return path


def _train_embedded_source(wanted: Comparison, processes: Processes) -> None:
    """Train the shipped recipes' source if it is asked for and not there."""
    sources = {cli.config.model.init_args.get("source") for cli in parsed(wanted.recipes, wanted.overrides).values()}
    if sources != {EMBEDDED}:
        return
    try:
        locate(EMBEDDED)
        return
    except FileNotFoundError:
        log.info("the recipes' source, %s, is not there yet; it is trained first", EMBEDDED)
    begun = sorted((p for p in Path(EMBEDDED).glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
    going_on = bool(begun) and _began(begun[-1])
    try:
        processes.dlm("ar_source", *(["resume", begun[-1]] if going_on else ["fit", "ar_source"]))
    except Failed as error:
        raise RuntimeError(f"the source could not be trained: {error}") from error


def _began(run: Path) -> bool:
    """Whether a folder holds a run that can go on."""
    return (run / runs.CONFIG).is_file() and (run / runs.ORIGIN).is_file()


def steps_of(recipe_of: Mapping[str, str], wanted: Comparison, processes: Processes) -> dict[str, int]:
    """How many steps each arm makes by the budget; ValueError if that is none, or the recipes disagree."""
    clis: dict[str, Any] = dict(parsed(recipe_of, wanted.overrides))
    own = {arm: cli.config.trainer.max_steps for arm, cli in clis.items()}
    unit, amount = wanted.budget.unit, wanted.budget.amount
    if amount is None:
        if len(set(own.values())) > 1:
            said = ", ".join(f"{arm} {steps}" for arm, steps in own.items())
            raise ValueError(f"the arms have different trainer.max_steps ({said}); give --steps")
        return own
    if unit == "steps":
        return _checked(dict.fromkeys(own, round(amount)))
    if unit == "forward_tokens":
        cost: dict[str, float] = {arm: forward_tokens_per_step(cli) for arm, cli in clis.items()}
    else:
        log.info("the budget is in seconds: %d steps of each arm say how many there can be", TRIAL)
        with ThreadPoolExecutor(processes.jobs) as pool:
            found = pool.map(lambda arm: _step_seconds(arm, recipe_of[arm], clis[arm], wanted, processes), clis)
            cost = dict(zip(clis, found, strict=True))
    if short := [arm for arm in cost if amount < cost[arm]]:
        raise ValueError(f"the budget is less than a step of {short[0]}, which takes {cost[short[0]]:.3g} {unit}")
    return _checked({arm: int(amount / cost[arm]) for arm in cost})


def _checked(steps: dict[str, int]) -> dict[str, int]:
    for arm, count in steps.items():
        if count > MOST_STEPS:
            raise ValueError(f"the budget is {count:.0e} steps of {arm}; {MOST_STEPS:.0e} are the most")
    return steps


def _step_seconds(arm: str, recipe: str, cli: Any, wanted: Comparison, processes: Processes) -> float:
    """Seconds of an optimizer step, by a short run that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / arm
        options = [f"trainer.max_steps={TRIAL}", "trainer.limit_val_batches=0", "trainer.log_every_n_steps=4"]
        options.append("trainer.callbacks=[{class_path: dlm_lightning.callbacks.throughput.Throughput}]")
        try:
            processes.dlm(f"{arm}-trial", "fit", recipe, *taken(recipe, wanted.overrides), *options, "--run", run)
        except Failed as error:
            raise RuntimeError(f"a trial of {arm} failed: {error}") from error
        rates = read_metrics(run / runs.METRICS, "speed/forward_tokens_per_second")
    return statistics.median(forward_tokens_per_step(cli) / rate for step, rate in rates if step >= TRIAL // 3)


def _run_all(recipe_of: Mapping[str, str], wanted: Comparison, place: Path, processes: Processes) -> list[Path]:
    """Train and measure what is missing; returns the logs of what failed."""
    todo = [(arm, seed) for seed in range(wanted.seeds) for arm in recipe_of]
    count, mutex = 0, threading.Lock()

    def one(pair: tuple[str, int]) -> Path | None:
        nonlocal count
        arm, seed = pair
        began, name = time.perf_counter(), f"{arm}-{seed}"
        try:
            trained = _train(place / "runs" / name, recipe_of[arm], seed, wanted, processes)
            made = _measure(place / "runs" / name, wanted, processes) or trained
        except Failed as error:
            if not processes.stopped:
                log.info("%s, seed %d failed: %s", arm, seed, error)
            return processes.log(name)
        with mutex:
            count += 1
            how = f"in {time.perf_counter() - began:.0f} s" if made else "was there"
            log.info("[%d of %d] %s, seed %d: %d steps, %s", count, len(todo), arm, seed, wanted.steps[arm], how)
        return None

    pool = ThreadPoolExecutor(processes.jobs)
    try:
        return [path for path in pool.map(one, todo) if path]
    except BaseException:
        processes.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _train(run: Path, recipe: str, seed: int, wanted: Comparison, processes: Processes) -> bool:
    """Begin or continue a run, unless it is finished; whether there was anything to do."""
    steps = wanted.steps[run.name.rpartition("-")[0]]
    if run.is_dir() and not _began(run):
        if any((run / checkpoint.FOLDER).glob("*")):
            raise Failed(f"{run} has lost its {runs.CONFIG} or {runs.ORIGIN}; put it back, or take the folder away")
        shutil.rmtree(run)  # cut off before it began
    if not run.is_dir():
        words = [f"seed_everything={seed}", f"data.seed={seed}", f"trainer.max_steps={steps}"]
        if wanted.budget.amount is not None and not any("trainer.val_check_interval=" in w for w in wanted.overrides):
            words.append(f"trainer.val_check_interval={max(1, steps // POINTS)}")
        processes.dlm(run.name, "fit", recipe, *taken(recipe, wanted.overrides), *words, "--run", run)
        return True
    newest = checkpoint.newest(run)
    if newest is not None and checkpoint.load(newest / checkpoint.STATE)["global_step"] >= steps:
        return False
    processes.dlm(run.name, "resume", run)
    return True


def _measure(run: Path, wanted: Comparison, processes: Processes) -> bool:
    """Measure a run, unless it was, in the same way; whether there was anything to do."""
    found = evaluation.load(run)
    if found and found["asked"] == {"tasks": wanted.tasks, "prompts": wanted.prompts, "overrides": []}:
        return False
    tasks = ["--tasks", *wanted.tasks] if wanted.tasks else []
    processes.dlm(run.name, "eval", run, "--prompts", wanted.prompts, *tasks)
    return True
