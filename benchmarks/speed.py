"""How fast is a training step? What `dlm bench` measures, against goals set before anything was made faster.

    python benchmarks/speed.py cpu        # two cores; slow in bfloat16 where a CPU has no units for it
    python benchmarks/speed.py growth     # two cores, half an hour: by length of rows, blocks, documents, vocabulary
    python benchmarks/speed.py gpu        # one H200-class GPU: minutes
    python benchmarks/speed.py tables     # docs/results/speed.md anew from docs/results/speed.json

Each writes its part of speed.json and, between marks, its table in speed.md. `key=value` is for all runs, for a trial.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dlm_lightning.bench import Request, measure
from dlm_lightning.bench.arms import Step, arms
from dlm_lightning.bench.record import Contest, Measured, named, surroundings
from dlm_lightning.bench.show import spread
from dlm_lightning.bench.timing import Spread, take_turns, wait_for
from dlm_lightning.drift import measure as measure_drift
from dlm_lightning.plan import prepare
from dlm_lightning.source import Source

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "results"
BLOCK, PAIR = "block_causal", "complementary_mask"
SMALL, LARGE = "4,096", "32,768"  # rows of the embedding on a CPU, the mask token's among them
QWEN3_06 = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
QWEN3_17 = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
DRIFT = "drift: 10 measurements in 1,000 steps, without table and picture, % of the time"


@dataclass(frozen=True)
class Goal:
    """A figure to reach: one arm over another by `what` of their steps, or of one arm alone, or of measuring the drift.

    size: of the vocabulary, where it matters. least: a factor to reach; or, with `most`, one not to exceed.
    """

    title: str
    recipe: str
    arms: tuple[str, ...]
    least: float | None
    stretch: float | None
    what: str = "time"
    most: bool = False
    size: str = ""


GOALS = {
    "cpu": [
        Goal("complementary: the peers' time over ours", PAIR, ("peers", "ours"), 2.0, 2.5, size=SMALL),
        Goal("complementary: the fair baseline's time over ours", PAIR, ("fair", "ours"), 1.3, 1.6, size=SMALL),
        Goal("complementary: the peers' time over ours", PAIR, ("peers", "ours"), 4.0, 5.0, size=LARGE),
        Goal("block-causal: the peers' time over ours", BLOCK, ("peers", "ours"), 1.3, 1.6, size=SMALL),
        Goal("block-causal: the fair baseline's time over ours", BLOCK, ("fair", "ours"), 1.1, 1.3, size=SMALL),
        Goal("complementary: our time over the AR step's", PAIR, ("ours", "ar"), 3.5, 2.8, most=True, size=SMALL),
        Goal(
            "complementary: our peak memory over the peers'", PAIR, ("ours", "peers"), 0.5, 0.33, "memory", True, LARGE
        ),
        Goal(DRIFT, BLOCK, (), 1.0, None, "drift", True, size=SMALL),
    ],
    "gpu": [
        Goal("block-causal: dense attention's time (the fair baseline) over ours", BLOCK, ("fair", "ours"), 3.0, 5.0),
        Goal("block-causal: our MFU over the AR step's", BLOCK, ("ours", "ar"), 0.85, None, "mfu"),
        Goal("block-causal: our MFU", BLOCK, ("ours",), None, 0.5, "mfu"),
        Goal("complementary: our MFU over the AR step's", PAIR, ("ours", "ar"), 0.85, None, "mfu"),
        Goal("complementary: our MFU", PAIR, ("ours",), None, 0.5, "mfu"),
        Goal(DRIFT, BLOCK, (), 1.0, None, "drift", True),
        Goal("drift: device memory beyond a step's peak, MiB", BLOCK, (), 0.0, None, "drift memory", True),
    ],
}
GROWTH = {  # of a step on a CPU, one key at a time
    "data.row_length": ("512", "1024", "2048", "4096", "8192"),
    "model.block_size": ("4", "16", "64"),
    "documents": ("1", "2", "4", "8"),
    "data.vocab_size": ("4095", "16383", "32767"),
}
PARTS = (*GOALS, "growth")
COMPILED = {"": [], ", compiled": ["model.compile=true"]}  # our layers and those of the AR step


def requests(part: str, turns: int, words: list[str]) -> dict[str, Request]:
    """What is measured, by column and size."""
    if part == "gpu":
        return {
            f"{column}/{recipe}": Request([recipe], [*own, *words], ["fair"], turns)
            for column, own in columns(part).items()
            for recipe in (BLOCK, PAIR)
        }
    if part == "growth":
        own = {key: ["data.batch_size=1"] if key == "data.row_length" else [] for key in GROWTH}
        return {
            key: Request(
                [PAIR], [*on_cpu(), *vocabulary(SMALL), *own[key], *words], ["fair"], turns, growth=(key, values)
            )
            for key, values in GROWTH.items()
        }
    return {
        f"{column}/{size}": Request(recipes, [*own, *vocabulary(size), *words], ["peers", "fair"], turns)
        for column, own in columns(part).items()
        for size, recipes in ((SMALL, [PAIR, BLOCK]), (LARGE, [PAIR]))
    }


def drifts(part: str, words: list[str]) -> dict[str, list[str]]:
    """The overrides of each model whose drift is measured, by column."""
    more = [] if part == "gpu" else vocabulary(SMALL)
    return {f"{column}/drift": [*own, *more, *words] for column, own in columns(part).items()}


def columns(part: str) -> dict[str, list[str]]:
    """The columns of a part's table, with their overrides."""
    if part == "cpu":
        found = {precision: on_cpu(precision) for precision in ("32-true", "bf16-mixed")}
    elif part == "gpu":
        found = {"Qwen3-0.6B": on_gpu(QWEN3_06, rows=2), "Qwen3-1.7B": on_gpu(QWEN3_17, rows=1)}
    else:
        found = {}
    return {f"{name}{how}": [*own, *words] for how, words in COMPILED.items() for name, own in found.items()}


def drift(words: list[str], turns: int) -> dict[str, Any]:
    """Seconds of a step and of a measurement of the drift, in turns; on a GPU also the bytes it needs beyond a step."""
    step = Step(prepare(BLOCK, words, here=True))
    network, ours = step.recipe.denoiser.network, arms([])[0]
    with TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.001 * torch.randn_like(parameter)
        both: dict[str, Callable[[], object]] = {
            "step": partial(step, ours),
            "drift": partial(measure_drift, network, Source(folder)),
        }
        seconds = take_turns(both, turns, wait=wait_for(step.device))
        peaks = [_peak(step.device, run) for run in both.values()] if step.device.type == "cuda" else None
    memory = max(0, peaks[1] - peaks[0]) if peaks else None
    return {"device": named(step.device), **surroundings(), "seconds": seconds, "memory": memory}


def _peak(device: torch.device, run: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device)


def on_cpu(precision: str = "32-true") -> list[str]:
    """A Qwen3 of six layers, rows of 512 tokens, blocks of 16."""
    model = shape({"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 6}, 32, 6, 3)
    data = ["data.row_length=512", "data.batch_size=2"]
    return [*model, *data, "model.block_size=16", f"trainer.precision={precision}", "trainer.accelerator=cpu"]


def vocabulary(size: str) -> list[str]:
    """So many rows of the embedding, the mask token's among them."""
    return [f"data.vocab_size={int(size.replace(',', '')) - 1}"]


def shape(values: dict[str, int], head: int, heads: int, key_heads: int) -> list[str]:
    """A Qwen3 of these sizes, with random weights and tied embeddings."""
    more = {"head_dim": head, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    config = {"model_type": "qwen3", **values, **more, "tie_word_embeddings": "true"}
    return ["model.source=null", f"model.config={{{', '.join(f'{key}: {value}' for key, value in config.items())}}}"]


def on_gpu(values: dict[str, int], rows: int) -> list[str]:
    """A Qwen3 of these sizes with its vocabulary, so many rows of 4,096 tokens, blocks of 32."""
    data = ["data.vocab_size=151935", "data.row_length=4096", f"data.batch_size={rows}", "model.block_size=32"]
    return [*shape(values, 128, 16, 8), *data, "trainer.accelerator=gpu", "trainer.precision=bf16-mixed"]


def reached(goal: Goal, record: dict[str, Any] | None) -> Spread | None:
    """The figure that a record holds of a goal, None if it was not measured."""
    if record is None:
        return None
    if goal.what == "drift":
        return Spread.of([100 * 10 * d / (1000 * s + 10 * d) for s, d in zip(*record["seconds"].values(), strict=True)])
    if goal.what == "drift memory":
        return None if record["memory"] is None else Spread.of([record["memory"] / 2**20])
    found = next((contest for contest in record["contests"] if contest["recipe"] == goal.recipe), None)
    if found is None:
        return None
    contest = read(found)
    arms = [contest.arm(name) for name in goal.arms]
    if goal.what == "memory":
        return Spread.of([arms[0].memory / arms[1].memory])
    if goal.what == "time":
        return contest.ratio(*goal.arms)
    if len(arms) == 1:
        return Spread.of([arms[0].flops / seconds / record["peak"] for seconds in arms[0].seconds])
    times = contest.ratio(goal.arms[1], goal.arms[0])
    return Spread(*(arms[0].flops / arms[1].flops * time for time in times))


def read(found: dict[str, Any]) -> Contest:
    """A contest as JSON holds it."""
    return Contest(found["recipe"], found["value"], found["precision"], [Measured(**arm) for arm in found["arms"]])


def verdict(goal: Goal, found: Spread | None) -> str:
    """A cell: median and spread, and what of the goal is reached."""
    if found is None:
        return "not measured"

    def holds(bound: float | None) -> bool:
        return bound is not None and (found.median <= bound if goal.most else found.median >= bound)

    said = "stretch" if holds(goal.stretch) else "reached" if holds(goal.least) else "missed"
    return f"{spread(found) if found.high > found.low else f'{found.median:.2f}'} ({said})"


def table(part: str, records: dict[str, Any]) -> str:
    """The Markdown table of a part, with the devices that it was measured on."""
    if part == "growth":
        return growth(records)
    names = [*columns(part)]
    lines = [f"| | vocabulary | goal | stretch | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    for goal in GOALS[part]:
        bound = "≤" if goal.most else "≥"
        bounds = [f"{bound} {limit:g}" if limit is not None else "" for limit in (goal.least, goal.stretch)]
        key = (goal.size or goal.recipe) if goal.arms else "drift"
        cells = [verdict(goal, reached(goal, records.get(f"{name}/{key}"))) for name in names]
        lines.append(f"| {' | '.join([goal.title, goal.size or '151,936', *bounds, *cells])} |")
    return "\n".join([*lines, "", where(records)])


def growth(records: dict[str, Any]) -> str:
    """The Markdown table of how a step grows, and its pictures' names."""
    lines = [
        "| what grows | | our step, s | the fair baseline's over ours | ours over AR | our peak, MiB |",
        "|---" * 6 + "|",
    ]
    for key, record in records.items():
        for contest in map(read, record["contests"]):
            ours = contest.arm("ours")
            cells = [
                spread(Spread.of(ours.seconds)),
                spread(contest.ratio("fair", "ours")),
                spread(contest.ratio("ours", "ar")),
            ]
            lines.append(f"| `{key}` | {int(contest.value or 0):,} | {' | '.join(cells)} | {ours.memory / 2**20:.0f} |")
    return "\n".join([*lines, "", where(records)])


def where(records: dict[str, Any]) -> str:
    """What figures were measured on."""
    said = {f"{r['device']}, threads: {r['threads']}, torch {r['versions']['torch']}" for r in records.values()}
    return f"Measured on: {'; '.join(sorted(said)) or 'nothing yet'}."


def write(out: Path) -> None:
    """The tables of speed.md, from speed.json."""
    kept, page = load(out), out / "speed.md"
    text = page.read_text()
    for part in PARTS:
        before, rest = text.split(f"<!-- {part} -->\n")
        after = rest.split(f"<!-- end of {part} -->")[1]
        text = f"{before}<!-- {part} -->\n{table(part, kept.get(part, {}))}\n<!-- end of {part} -->{after}"
    page.write_text(text)


def load(out: Path) -> dict[str, Any]:
    """What speed.json holds, which may be nothing."""
    path = out / "speed.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def plain(request: Request) -> dict[str, Any]:
    """What is kept of a request."""
    return measure(request).plain()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "tables"])
    parser.add_argument("words", nargs="*", metavar="key=value", help="of all runs, for a trial")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument(
        "--only", default="", metavar="NAME", help="such as bf16-mixed: what begins so, the rest stays as it is"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the folder with speed.md")
    args = parser.parse_intermixed_args()
    if args.turns < 1:
        parser.error("--turns must be at least 1")
    if args.words and args.out == OUT:
        parser.error("a trial by key=value needs an --out of its own")
    if not (args.out / "speed.md").is_file():
        parser.error(f"--out {args.out} has no speed.md to write to")
    if args.part == "gpu" and not torch.cuda.is_available():
        parser.error("gpu: there is no CUDA device")
    if args.part != "tables":
        jobs = {name: partial(plain, request) for name, request in requests(args.part, args.turns, args.words).items()}
        jobs |= {name: partial(drift, words, args.turns) for name, words in drifts(args.part, args.words).items()}
        chosen = {name: job for name, job in jobs.items() if name.startswith(args.only)}
        if not chosen:
            parser.error(f"--only {args.only}: nothing begins so; there are {', '.join(jobs)}")
        for name, job in chosen.items():
            record = job()
            kept = load(args.out)
            kept.setdefault(args.part, {})[name] = record
            (args.out / "speed.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
            print(name, "done", flush=True)
    write(args.out)
    print((args.out / "speed.md").read_text())


if __name__ == "__main__":
    main()
