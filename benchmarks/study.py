"""Do the papers' findings hold here? Two small AR sources, converted in several ways with the same work, over seeds.

    python benchmarks/study.py sources   # trains the sources of benchmarks/study/: within an hour on two cores
    python benchmarks/study.py patterns  # the three recipes, as docs/results/comparison.md and .html show them
    python benchmarks/study.py context   # items 1 and 2: converts them, three seeds; finished runs are kept
    python benchmarks/study.py masking   # item 4
    python benchmarks/study.py full      # the other items
    python benchmarks/study.py verdicts  # writes docs/results/study.md and .json from what is there

Every step goes on where it was cut off, and `verdicts` keeps what study.json says of runs that are no longer there.
What is judged, and how: benchmarks/findings.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from findings import (
    ATTENTION,
    BOUND,
    EIGHT,
    FFN,
    FINDINGS,
    FOUR,
    ONE,
    SEEDS,
    SHOWN,
    SOURCES,
    TWO,
    Finding,
    judge,
    verdict_table,
    way,
)

from dlm_lightning import report
from dlm_lightning.decode.selector import Threshold
from dlm_lightning.evaluation import ask
from dlm_lightning.generate import read
from dlm_lightning.parsing import quiet
from dlm_lightning.reopening import restore
from dlm_lightning.report.content import Run, expand, read_run
from dlm_lightning.report.tables import spread
from dlm_lightning.tasks import questions

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "benchmarks" / "study"
RUNS = Path("runs/study")
OUT = ROOT / "docs" / "results" / "study.md"
PARTS = {  # the arms, by the folder of their recipes and runs
    "context": ("bidirectional", "bidirectional_shift", "block_noisy", "block", "block_shift"),
    "masking": ("block_tilt_25", "block_tilt_10", "block_tilt_05", "block_right_to_left"),
    "full": (
        "block_4",
        "block_32",
        "complementary",
        "complementary_noisy",
        "independent_views",
        "lr_low",
        "lr_high",
        "lora_4",
        "lora_32",
    ),
}
GRIDS = {  # of decoding, by arm: a block size in decoding, or the size of a block's parts, and tokens per forward
    **{arm: [("block", size, k) for size in (4, 16, 32) for k in (1, 4)] for arm in ("block_4", "block", "block_32")},
    "complementary": [(kind, size, 4) for kind in ("block", "part") for size in (2, 4, 8, 16)],
}
GRID = "grid.json"
PATTERNS = ("full_bidirectional", "block_causal", "complementary_mask")
TASKS, PROMPTS = ("copy", "reverse", "sort", "close"), 32
ASKED = ("--prompts", PROMPTS, "--tasks", ",".join(TASKS))
WORK = (
    "trainer.max_steps=200",
    "trainer.val_check_interval=100",
    "data.val_rows=16",
)  # 90 minutes for items 1, 2 and 4
LEARNED = 0.9  # exact match of the source on a task that is kept
Measure = Callable[[Run], float | None]


def dlm(*words: object, threads: int = 1) -> None:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "dlm_lightning.cli", *map(str, words)]
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": str(threads), **os.environ})


def sources(trial: Sequence[str]) -> None:
    """Train and measure both, side by side."""

    def one(name: str) -> None:
        run = RUNS / "sources" / name
        if not (run / "model" / "config.json").is_file():
            dlm(*(["resume", run] if run.is_dir() else ["fit", RECIPES / f"{name}.yaml", *trial, "--run", run]))
        if not (run / "evaluation.json").is_file():
            dlm("eval", run, "--prompts", 100)

    with ThreadPoolExecutor(len(SOURCES)) as pool:
        list(pool.map(one, SOURCES))


def arms(part: str, jobs: int, seeds: int, trial: Sequence[str]) -> None:
    """Arms of both sources, as two comparisons; one part's control arm serves them all."""
    for source in SOURCES:
        recipes = [RECIPES / part / f"{arm}.yaml" for arm in PARTS[part]]
        model = f"model.source={RUNS / 'sources' / source}"
        given = ["--seeds", seeds, "--jobs", jobs, *ASKED, "--run", RUNS / part / source]
        dlm("compare", *recipes, model, *WORK, *trial, *given, *([] if part == "context" else ["--no-control"]))


def patterns(jobs: int, seeds: int, trial: Sequence[str]) -> None:
    """The shipped recipes from the first source, and their page in docs/results."""
    recipes = [RECIPES / "patterns" / f"{name}.yaml" for name in PATTERNS]
    source, place = RUNS / "sources" / SOURCES[0], RUNS / "patterns"
    given = [f"model.source={source}", *trial, "--seeds", seeds, "--jobs", jobs, *ASKED, "--run", place]
    dlm("compare", *(os.path.relpath(recipe) for recipe in recipes), *given)
    page = ROOT / "docs" / "results" / "comparison.md"
    write_between(page, {"tables": (place / report.MARKDOWN).read_text()})
    page.with_suffix(".html").write_text((place / report.HTML).read_text())


def write_between(page: Path, parts: dict[str, str]) -> None:
    """Put texts between their marks in a document."""
    text = page.read_text()
    for name, part in parts.items():
        before, rest = text.split(f"<!-- {name} -->")
        after = rest.split("<!-- end -->", 1)[1]
        text = f"{before}<!-- {name} -->\n{part.strip()}\n<!-- end -->{after}"
    page.write_text(text)


def grids() -> None:
    """Decode what is decoded in more ways than `dlm eval` does; kept in each run."""
    quiet()
    for source in SOURCES:
        for (arm, _), run in runs_of(source).items():
            if arm in GRIDS and not (run.path / GRID).is_file():
                found = grid(run, GRIDS[arm], kept(source))
                (run.path / GRID).write_text(json.dumps(found, indent=1) + "\n")


def grid(run: Run, ways: Sequence[tuple[str, int, int]], titles: Sequence[str]) -> dict[str, float]:
    """Exact match in points over those of the tasks that the run trains on, by way of decoding."""
    _, recipe, _ = restore(str(run.path))
    recipe.eval()
    asked = questions(recipe.trainer.datamodule, list(TASKS), PROMPTS)
    found = {}
    for kind, size, k in ways:
        plan = replace(read("block", []), selector=Threshold(1e-9, at_most=k))
        plan = replace(plan, block_size=size) if kind == "block" else replace(plan, part_size=size)
        right = [ask(recipe, asked[title], plan)["exact"] / len(asked[title]) for title in titles if title in asked]
        if right:
            found[way(kind, size, k)] = 100 * sum(right) / len(right)
    return found


# What is found


def exact(decoder: str = "threshold 0.9") -> Measure:
    """Exact match in points over the tasks that the source has learned."""

    def measure(run: Run) -> float | None:
        rows = [row for row in run.rows(decoder) if row["task"] in kept(run.path.parent.parent.name)]
        return 100 * sum(row["exact"] / row["count"] for row in rows) / len(rows) if rows else None

    return measure


def decoded(kind: str, size: int, k: int) -> Measure:
    """What `grids` found."""

    def measure(run: Run) -> float | None:
        path = run.path / GRID
        return json.loads(path.read_text()).get(way(kind, size, k)) if path.is_file() else None

    return measure


def kept(source: str) -> list[str]:
    """The generated tasks that a source has learned."""
    found = json.loads((RUNS / "sources" / source / "evaluation.json").read_text())
    return [r["task"] for r in found["tasks"] if r["exact"] >= LEARNED * r["count"]]


MEASURES: dict[str, Measure] = {
    ONE: exact("1 per forward"),
    TWO: exact("2 per forward"),
    FOUR: exact("4 per forward"),
    EIGHT: exact("8 per forward"),
    BOUND: lambda run: run.at("bound", "masked", "16"),
    ATTENTION: lambda run: run.drifted("attention", "mean_abs"),
    FFN: lambda run: run.drifted("FFN", "mean_abs"),
    **{way(*its): decoded(*its) for its in dict.fromkeys(its for ways in GRIDS.values() for its in ways)},
}


def runs_of(source: str) -> dict[tuple[str, int], Run]:
    """A source's runs by arm and seed, those that are finished and measured."""
    folders = [str(place) for part in PARTS if (place := RUNS / part / source).is_dir()]
    return {(run.recipe, run.seed): run for run in map(read_run, expand(folders)) if run.found}


def differences(finding: Finding, runs: dict[tuple[str, int], Run]) -> list[float]:
    """A finding's same-seed differences over a source's runs."""
    sides = [(finding.arm, MEASURES[finding.measure]), (finding.than, MEASURES[finding.against or finding.measure])]
    found = []
    for seed in range(SEEDS):
        its = [measure(runs[arm, seed]) for arm, measure in sides if (arm, seed) in runs]
        if len(its) == 2 and None not in its:
            found.append(its[0] - its[1])  # type: ignore[operator]
    return found


def measured() -> dict[str, Any]:
    """What the runs say that are there: what sources have learned, every measure of every arm, and the differences."""
    runs = {source: runs_of(source) for source in SOURCES}
    learned, found = {}, {}
    for source, its in runs.items():
        path = RUNS / "sources" / source / "evaluation.json"
        if path.is_file():
            rows = json.loads(path.read_text())["tasks"]
            learned[source] = {row["task"]: 100 * row["exact"] / row["count"] for row in rows}
        by_arm: dict[str, list[Run]] = {}
        for (arm, _), run in sorted(its.items()):
            by_arm.setdefault(arm, []).append(run)
        found[source] = {
            arm: {name: values(of_arm, MEASURES[name]) for name in SHOWN} for arm, of_arm in by_arm.items()
        }
    pairs = {finding.name: {source: differences(finding, its) for source, its in runs.items()} for finding in FINDINGS}
    return {"sources": learned, "arms": found, "differences": pairs}


def values(runs: Sequence[Run], measure: Measure) -> list[float]:
    """A measure of all runs that have it."""
    return [value for run in runs if (value := measure(run)) is not None]


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """An earlier sitting's results and this one's, which goes before where it has as many runs."""
    result = {"sources": old["sources"] | new["sources"], "arms": {}, "differences": {}}
    for source in SOURCES:
        arms = dict(old["arms"].get(source, {}))
        for arm, its in new["arms"].get(source, {}).items():
            if len(its[BOUND]) >= len(arms.get(arm, {}).get(BOUND, [])):
                arms[arm] = its
        result["arms"][source] = arms
    for name, found in new["differences"].items():
        before = old["findings"].get(name, {}).get("by_source", {})
        result["differences"][name] = {
            source: max(its, before.get(source, []), key=len) for source, its in found.items()
        }
    return result


def arm_table(source: str, found: dict[str, dict[str, list[float]]]) -> str:
    """Means over seeds of every measure."""
    lines = [f"| `{source}`: arm | seeds | {' | '.join(SHOWN)} |", "|---" * (len(SHOWN) + 2) + "|"]
    for arm in ("control", *(arm for arms in PARTS.values() for arm in arms)):
        if its := found.get(arm):
            cells = [spread(its[name], 4 if "drift" in name else 3 if name == BOUND else 1) for name in SHOWN]
            lines.append(f"| `{arm}` | {max(map(len, its.values()))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def source_table(learned: dict[str, dict[str, float]]) -> str:
    """What the sources have learned."""
    lines = ["| source | task | exact match, % | kept |", "|---|---|---|---|"]
    for source, its in learned.items():
        for task, right in its.items():
            lines.append(f"| `{source}` | {task} | {right:.0f} | {'yes' if right >= 100 * LEARNED else 'no'} |")
    return "\n".join(lines)


def verdicts() -> None:
    """Write docs/results/study.json, and its tables between their marks in study.md."""
    record, found = OUT.with_suffix(".json"), measured()
    if record.is_file():
        found = joined(json.loads(record.read_text()), found)
    pairs = found.pop("differences")
    found["findings"] = {finding.name: judge(finding, pairs[finding.name]) for finding in FINDINGS}
    record.write_text(json.dumps(found, indent=1) + "\n")
    parts = {"sources": source_table(found["sources"]), "verdicts": verdict_table(found["findings"])}
    parts["arms"] = "\n\n".join(arm_table(source, its) for source, its in found["arms"].items())
    write_between(OUT, parts)
    print(parts["verdicts"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("sources", "patterns", *PARTS, "verdicts"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of each arm")
    parser.add_argument("words", nargs="*", metavar="key=value", help="of all runs, for a trial")
    args = parser.parse_intermixed_args()
    if args.part == "sources":
        sources(args.words)
    elif args.part == "patterns":
        patterns(args.jobs, args.seeds, args.words)
    elif args.part == "verdicts":
        verdicts()
    else:
        arms(args.part, args.jobs, args.seeds, args.words)
        if args.part == "full":
            grids()


if __name__ == "__main__":
    main()
