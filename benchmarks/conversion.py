"""Is conversion real? Each pattern at the demo's budget, from the AR source and from random weights, over seeds.

    python benchmarks/conversion.py --seeds 3 --jobs 2   # needs runs/ar_source (make demo); finished runs are kept
    python benchmarks/conversion.py --table-only         # only write docs/results/conversion.md from what is there
    python benchmarks/conversion.py --out table.md       # write the table somewhere else

A run that is finished is not made again, and one that was cut off is continued. Jobs share out the cores.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dlm_lightning.callbacks.weight_drift import last

ROOT = Path(__file__).parents[1]
RECIPES = ("full_bidirectional", "block_causal", "complementary_mask")
ATTENTION, FFN = ("q", "k", "v", "o"), ("gate", "up", "down")
RUNS = Path("runs/conversion")
OUT = ROOT / "docs" / "results" / "conversion.md"


def folder(recipe: str, pretrained: bool, seed: int) -> Path:
    """Where a run of this benchmark lies."""
    return RUNS / f"{recipe}-{'source' if pretrained else 'random'}-{seed}"


def fit(recipe: str, pretrained: bool, seed: int, threads: int, trial: list[str]) -> None:
    """Run a recipe as it is, with its seed and its start; continues a run that was cut off."""
    run = folder(recipe, pretrained, seed)
    if run.is_dir() and done(run):
        return
    dlm = [sys.executable, "-m", "dlm_lightning.cli"]
    start = [f"seed_everything={seed}", f"data.seed={seed}", f"model.pretrained={str(pretrained).lower()}"]
    words = ["resume", str(run)] if run.is_dir() else ["fit", recipe, *start, *trial, "--run", str(run)]
    subprocess.run([*dlm, *words], check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def done(run: Path) -> bool:
    """Whether a run has made its last step."""
    from yaml import safe_load

    steps = safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"]
    return (run / "checkpoints" / f"step={steps}").exists()


def validations(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv that hold a validation."""
    if not (run / "metrics.csv").is_file():
        return []
    with (run / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("val/nelbo")]


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and range over seeds."""
    if not values:
        return "not measured"
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(seeds: int) -> str:
    """The Markdown table of all runs that are finished."""
    lines = [
        "| recipe | start | NELBO before | NELBO after | next-token NLL after | mean abs ΔW attention | FFN | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        for pretrained in (True, False):
            runs = [folder(recipe, pretrained, seed) for seed in range(seeds)]
            runs = [run for run in runs if validations(run) and done(run)]
            before, after, ar, attention, ffn = [], [], [], [], []
            for run in runs:
                rows = validations(run)
                before.append(float(rows[0]["val/nelbo"]))
                after.append(float(rows[-1]["val/nelbo"]))
                ar.append(float(rows[-1]["val/ar_nll"]))
                groups = last(run / "drift" / "drift.parquet")[1]
                attention.append(statistics.fmean(groups[name]["mean_abs"] for name in ATTENTION))
                ffn.append(statistics.fmean(groups[name]["mean_abs"] for name in FFN))
            cells = [spread(before), spread(after), spread(ar), spread(attention, 4), spread(ffn, 4), str(len(runs))]
            lines.append(f"| `{recipe}` | {'the AR source' if pretrained else 'random'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT, help="the file whose table is replaced")
    parser.add_argument("words", nargs="*", metavar="key=value", help="of all runs, for a trial")
    args = parser.parse_intermixed_args()
    if not args.table_only:
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        arms = [(recipe, start, seed) for seed in range(args.seeds) for recipe in RECIPES for start in (True, False)]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda arm: fit(*arm, threads, args.words), arms))
    text = args.out.read_text() if args.out.is_file() else "<!-- table -->\n<!-- end -->\n"
    before, rest = text.split("<!-- table -->")
    after = rest.split("<!-- end -->")[1]
    args.out.write_text(f"{before}<!-- table -->\n{table(args.seeds)}\n<!-- end -->{after}")
    print(table(args.seeds))


if __name__ == "__main__":
    main()
