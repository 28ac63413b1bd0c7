"""Do the papers' findings hold here? Two small AR sources, converted in several ways with the same work, over seeds.

    python benchmarks/study.py sources   # trains the sources of benchmarks/study/: within an hour on two cores
    python benchmarks/study.py arms      # converts them, all arms with three seeds; finished runs are kept
    python benchmarks/study.py verdicts  # writes docs/results/study.md and .json from what is there

Every step goes on where it was cut off. A finding **reproduces** or **contradicts** if all same-seed pairs of both
sources agree in sign and the 95 % interval of their mean excludes 0; or else it is **not resolvable here**.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm_lightning.report.content import Run, expand, read_run
from dlm_lightning.report.pairs import Paired
from dlm_lightning.report.tables import spread

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "benchmarks" / "study"
RUNS = Path("runs/study")
OUT = ROOT / "docs" / "results" / "study.md"
SOURCES = ("qwen3", "llama")
ARMS = (
    "bidirectional",
    "bidirectional_shift",
    "block_noisy",
    "block",
    "block_shift",
    "block_round",
    "block_tilt_25",
    "block_tilt_10",
    "block_tilt_05",
    "block_right_to_left",
)
SEEDS = 3
PROMPTS = 24
LEARNED = 0.9  # exact match of the source on a task that is kept
Measure = Callable[[Run], float | None]


def dlm(*words: object, threads: int = 1) -> None:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "dlm_lightning.cli", *map(str, words)]
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": str(threads), **os.environ})


def sources() -> None:
    """Train and measure both, side by side."""

    def one(name: str) -> None:
        run = RUNS / "sources" / name
        if not (run / "model" / "config.json").is_file():
            dlm(*(["resume", run] if run.is_dir() else ["fit", RECIPES / f"{name}.yaml", "--run", run]))
        if not (run / "evaluation.json").is_file():
            dlm("eval", run, "--prompts", 100)

    with ThreadPoolExecutor(len(SOURCES)) as pool:
        list(pool.map(one, SOURCES))


def arms(jobs: int) -> None:
    """All arms of both sources, as two comparisons."""
    for source in SOURCES:
        recipes = [RECIPES / "arms" / f"{arm}.yaml" for arm in ARMS]
        model = f"model.source={RUNS / 'sources' / source}"
        options = ["--seeds", SEEDS, "--jobs", jobs, "--prompts", PROMPTS, "--run", RUNS / source]
        dlm("compare", *recipes, model, *options)


# What is found


@dataclass(frozen=True)
class Finding:
    """A paper's claim as a difference: of `arm` less `than`, in a measure, positive or negative as the paper says."""

    item: str
    claim: str
    arm: str
    than: str
    measure: str
    sign: int
    paper: str


def exact(decoder: str = "threshold 0.9") -> Measure:
    """Exact match in points over the tasks that the source has learned."""

    def measure(run: Run) -> float | None:
        rows = [row for row in run.rows(decoder) if row["task"] in kept(run.path.parent.parent.name)]
        return 100 * sum(row["exact"] / row["count"] for row in rows) / len(rows) if rows else None

    return measure


def kept(source: str) -> list[str]:
    """The generated tasks that a source has learned."""
    found = json.loads((RUNS / "sources" / source / "evaluation.json").read_text())
    return [r["task"] for r in found["tasks"] if r["exact"] >= LEARNED * r["count"]]


MEASURES: dict[str, Measure] = {
    "exact match, one token per forward": exact("1 per forward"),
    "exact match, 2 per forward": exact("2 per forward"),
    "exact match, 4 per forward": exact("4 per forward"),
    "exact match, 8 per forward": exact("8 per forward"),
    "bound, block 16": lambda run: run.at("bound", "masked", "16"),
    "drift of attention": lambda run: run.drifted("attention", "mean_abs"),
    "drift of FFN": lambda run: run.drifted("FFN", "mean_abs"),
}
ONE, TWO, FOUR, EIGHT, BOUND, ATTENTION, FFN = MEASURES
UNIFORM = "block_round"
FINDINGS = [
    Finding("1", "block-wise is more accurate than bidirectional", "block", "bidirectional", ONE, 1, "+19.12 (g − c)"),
    Finding("1", "block-wise has the lower bound", "block", "bidirectional", BOUND, -1, "not given"),
    Finding(
        "1", "a noisy context is more accurate than bidirectional", "block_noisy", "bidirectional", ONE, 1, "+8.94"
    ),
    Finding("1", "a clean context is more accurate than a noisy one", "block", "block_noisy", ONE, 1, "+9.46 (f − d)"),
    Finding("1", "a clean context has the lower bound", "block", "block_noisy", BOUND, -1, "not given"),
    Finding("1", "bidirectional drifts more, attention", "bidirectional", "block", ATTENTION, 1, "figure 2e"),
    Finding("1", "bidirectional drifts more, FFN", "bidirectional", "block", FFN, 1, "figure 2e"),
    Finding("1", "a noisy context drifts more, FFN", "block_noisy", "block", FFN, 1, "figure 2e"),
    Finding("2", "no shift is better, block-wise", "block", "block_shift", ONE, 1, "+0.72 (g − f)"),
    Finding("2", "no shift is better, bidirectional", "bidirectional", "bidirectional_shift", ONE, 1, "+1.19 (c − b)"),
    *(
        Finding("4", f"half-life {x} is better than uniform", f"block_tilt_{arm}", UNIFORM, measure, 1, paper)
        for arm, x, papers in (
            ("10", "0.1", ("+1.75", "+1.67", "+2.64", "+4.38")),
            ("25", "0.25", ("+0.14", "+1.44", "−0.14", "+0.56")),
            ("05", "0.05", ("+0.24", "+0.56", "+1.95", "+3.39")),
        )
        for measure, paper in zip((ONE, TWO, FOUR, EIGHT), papers, strict=True)
    ),
    *(
        Finding("4", "right-to-left is worse than uniform", "block_right_to_left", UNIFORM, measure, -1, paper)
        for measure, paper in zip((ONE, TWO, FOUR, EIGHT), ("−22.06", "−29.57", "−32.51", "−19.86"), strict=True)
    ),
]


def runs_of(source: str) -> dict[tuple[str, int], Run]:
    """A source's runs by arm and seed."""
    folder = RUNS / source
    found = [read_run(path) for path in expand([str(folder)])] if folder.is_dir() else []
    return {(run.recipe, run.seed): run for run in found}


def judge(finding: Finding, runs: Sequence[dict[tuple[str, int], Run]]) -> dict[str, Any]:
    """A finding's pairs over all sources and seeds, and the verdict."""
    measure, differences = MEASURES[finding.measure], []
    for of_source in runs:
        for seed in range(SEEDS):
            values = [measure(of_source[arm, seed]) for arm in (finding.arm, finding.than) if (arm, seed) in of_source]
            if len(values) == 2 and None not in values:
                differences.append(values[0] - values[1])  # type: ignore[operator]
    if not differences:
        return {"verdict": "not measured", "differences": []}
    paired = Paired(differences)
    verdict = "not resolvable here"
    if paired.resolved:
        verdict = "reproduces" if paired.mean * finding.sign > 0 else "contradicts"
    return {"verdict": verdict, "differences": differences, "mean": paired.mean, "half_width": paired.half_width}


def verdict_table(judged: Sequence[tuple[Finding, dict[str, Any]]]) -> str:
    """In Markdown."""
    head = ["item", "finding", "measure", "difference", "pairs", "the paper's", "verdict"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for finding, found in judged:
        difference = "–"
        if found["differences"]:
            digits = 4 if "drift" in finding.measure else 3 if finding.measure == BOUND else 1
            width = "" if len(found["differences"]) < 2 else f" ± {found['half_width']:.{digits}f}"
            difference = f"{found['mean']:+.{digits}f}{width}".replace("-", "−")
        cells = [finding.item, f"{finding.claim} (`{finding.arm}` − `{finding.than}`)", finding.measure, difference]
        cells += [str(len(found["differences"])), finding.paper, f"**{found['verdict']}**"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def arm_table(source: str, runs: dict[tuple[str, int], Run]) -> str:
    """Means over seeds of every measure."""
    lines = [f"| `{source}`: arm | seeds | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 2) + "|"]
    for arm in (*ARMS, "control"):
        its = [runs[arm, seed] for seed in range(SEEDS) if (arm, seed) in runs]
        cells = []
        for name, measure in MEASURES.items():
            values = [value for run in its if (value := measure(run)) is not None]
            cells.append(spread(values, 4 if "drift" in name else 3 if name == BOUND else 1))
        if its:
            lines.append(f"| `{arm}` | {len(its)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def source_table() -> str:
    """What the sources have learned."""
    lines = ["| source | task | exact match, % | kept |", "|---|---|---|---|"]
    for source in SOURCES:
        path = RUNS / "sources" / source / "evaluation.json"
        for row in json.loads(path.read_text())["tasks"] if path.is_file() else ():
            right = 100 * row["exact"] / row["count"]
            lines.append(f"| `{source}` | {row['task']} | {right:.0f} | {'yes' if right >= 100 * LEARNED else 'no'} |")
    return "\n".join(lines)


def verdicts() -> None:
    """Write the tables between their marks in docs/results/study.md, and the pairs as JSON."""
    runs = {source: runs_of(source) for source in SOURCES}
    judged = [(finding, judge(finding, list(runs.values()))) for finding in FINDINGS]
    parts = {"sources": source_table(), "verdicts": verdict_table(judged)}
    parts["arms"] = "\n\n".join(arm_table(source, runs[source]) for source in SOURCES)
    text = OUT.read_text()
    for name, table in parts.items():
        before, rest = text.split(f"<!-- {name} -->")
        after = rest.split("<!-- end -->", 1)[1]
        text = f"{before}<!-- {name} -->\n{table}\n<!-- end -->{after}"
    OUT.write_text(text)
    record = [{**vars(finding), **found} for finding, found in judged]
    OUT.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(parts["verdicts"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("sources", "arms", "verdicts"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    if args.part == "sources":
        sources()
    elif args.part == "arms":
        arms(args.jobs)
    else:
        verdicts()


if __name__ == "__main__":
    main()
