"""Which decoder is fastest at equal accuracy? Exact match, tokens per second and per forward, of all of them.

    python benchmarks/decode.py --fit    # trains what is missing of the source and its conversions: hours on two cores
    python benchmarks/decode.py          # measures; writes docs/results/decoding.json, .png and the tables of .md
    python benchmarks/decode.py --tables-only

A prompt at a time goes through every decoder, in an order that changes, in one process: what disturbs one disturbs all.
Prompts are of the held-out split of the conversions' data (benchmarks/decoding/conversion.yaml). The baseline is the
faster of transformers' `generate` and our cached loop, both on the AR source.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from dlm_lightning.cache import Cache
from dlm_lightning.catalog import compose
from dlm_lightning.data.exact_answers import ExactAnswers
from dlm_lightning.decode.decoder import decode
from dlm_lightning.decode.plan import Plan
from dlm_lightning.decode.selector import Schedule, Threshold
from dlm_lightning.decode.stopper import Stopper
from dlm_lightning.denoiser import Denoiser
from dlm_lightning.generate import read
from dlm_lightning.parsing import quiet
from dlm_lightning.reopening import restore

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "benchmarks" / "decoding"
RUNS = Path("runs/decoding")
OUT = ROOT / "docs" / "results" / "decoding.md"
SOURCE = "ar_source"
CONVERSIONS = ("block_causal", "complementary_mask", "full_bidirectional")
THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 1.0)
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (256, 1024, 4096)
AFTER = 8  # new tokens at least beyond the longest answer, and what their number is a multiple of
PARTS = 10  # of the prompts; a ratio is taken in each
REPEATS = 200  # of a forward of each width

Act = Callable[[list[int]], tuple[list[int], int]]


@dataclass(frozen=True)
class Prompt:
    """A task's prompt, and its answer as text."""

    task: str
    ids: list[int]
    answer: str


@dataclass
class Arm:
    """A decoder on a model. `act` takes a prompt's tokens to the new tokens and the forwards that they took."""

    model: str
    decoder: str
    act: Act
    threshold: float | None = None
    right: list[bool] = field(default_factory=list)  # of each prompt, as what follows
    tokens: list[int] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def run(self, prompt: Prompt, tokenizer: Any) -> None:
        """Decode a prompt and note what came of it."""
        began = time.perf_counter()
        new_ids, forwards = self.act(prompt.ids)
        self.seconds.append(round(time.perf_counter() - began, 6))
        self.tokens.append(len(new_ids))
        self.forwards.append(forwards)
        self.right.append(tokenizer.decode(new_ids, skip_special_tokens=True) == prompt.answer)

    def record(self) -> dict[str, Any]:
        """What was noted, for the JSON."""
        return {name: value for name, value in vars(self).items() if name != "act"}


def fit(trial: list[str]) -> None:
    """Train what is missing, each conversion from the source; continues a run that was cut off."""
    for name in (SOURCE, *CONVERSIONS):
        run = RUNS / name
        words = (
            ["resume", str(run)] if run.is_dir() else ["fit", str(RECIPES / f"{name}.yaml"), *trial, "--run", str(run)]
        )
        if not (run / "model").is_dir():
            subprocess.run([sys.executable, "-m", "dlm_lightning.cli", *words], check=True)


def prompts(data: dict[str, Any], tokenizer: Any, per_task: int) -> list[Prompt]:
    """So many prompts of each task that were kept from training, tasks taking turns."""
    found: dict[str, list[Prompt]] = {task: [] for task in data["tasks"]}
    for prompt, answer in ExactAnswers(**data).texts("val"):
        of_task = found[task := prompt.text.split()[0]]
        if len(of_task) < per_task:
            ids = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
            of_task.append(Prompt(task, ids, answer.text))
    return [prompt for turn in zip(*found.values(), strict=True) for prompt in turn]


def ours(denoiser: Denoiser, plan: Plan) -> Act:
    """This project's loop."""

    def act(ids: list[int]) -> tuple[list[int], int]:
        [row] = decode(denoiser, [ids], plan).rows
        return row.new_ids, row.forwards

    return act


def theirs(folder: Path, new_tokens: int) -> Act:
    """transformers' greedy `generate` with its own cache and attention."""
    network = AutoModelForCausalLM.from_pretrained(folder).eval()

    @torch.no_grad()
    def act(ids: list[int]) -> tuple[list[int], int]:
        out = network.generate(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False)
        return out[0, len(ids) :].tolist(), out.shape[1] - len(ids)

    return act


def arms(denoisers: dict[str, Denoiser], new_tokens: int) -> Iterator[Arm]:
    """Every decoder on every model that it suits, over thresholds."""

    def plan(name: str, **parts: Any) -> Plan:
        shipped = read(name, [])
        return replace(shipped, stopper=replace(shipped.stopper, new_tokens=new_tokens), **parts)

    yield Arm(SOURCE, "transformers", theirs(RUNS / SOURCE / "model", new_tokens))
    yield Arm(SOURCE, "autoregressive", ours(denoisers[SOURCE], plan("autoregressive")))
    for model, denoiser in denoisers.items():
        if model == SOURCE:
            continue
        blocks = denoiser.pattern.block_size is not None
        chosen: list[tuple[str, Plan, float | None]] = []
        for threshold in THRESHOLDS:
            selector = Threshold(threshold)
            for name in ("block", "sub_block", "dkv") if blocks else ("semi_autoregressive", "dkv"):
                if name == "block" or threshold in (0.7, 0.9):
                    chosen.append((name, plan(name, selector=selector), threshold))
        if blocks:
            chosen.append(("adaptive", plan("adaptive"), None))
            chosen.append(("block, 4 forwards", plan("block", selector=Schedule(4)), None))
        else:
            chosen.append(("full_bidirectional, 8 forwards", plan("full_bidirectional", selector=Schedule(8)), None))
            chosen.append(("dkv_greedy", plan("dkv_greedy"), None))
        for name, its_plan, its_threshold in chosen:
            yield Arm(model, name, ours(denoiser, its_plan), its_threshold)


def frontier(denoisers: dict[str, Denoiser], tokenizer: Any, asked: list[Prompt], new_tokens: int) -> list[Arm]:
    """All arms after all prompts, each prompt in another order of the arms."""
    entered, rng = list(arms(denoisers, new_tokens)), random.Random(0)
    for arm in entered:  # once each without being noted, as the first call is slower
        arm.act(asked[0].ids)
    for number, prompt in enumerate(asked, 1):
        for arm in rng.sample(entered, len(entered)):
            arm.run(prompt, tokenizer)
        print(f"\r{number} of {len(asked)} prompts", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return entered


@torch.no_grad()
def widths(denoiser: Denoiser, context: int) -> dict[int, float]:
    """Median seconds of a forward of so many tokens that looks at a cached context, widths taking turns."""
    pattern, seconds = denoiser.pattern, {width: [] for width in WIDTHS}  # type: dict[int, list[float]]
    block = pattern.block_size or 1
    context = context // block * block
    generator = torch.Generator().manual_seed(0)

    def view(first: int, last: int, mask: bool) -> tuple[Any, Tensor]:
        position_BS = torch.arange(first, last)[None]
        known = torch.tensor(denoiser.token_ids)[
            torch.randint(len(denoiser.token_ids), (1, last - first), generator=generator)
        ]
        ids_BS = torch.full_like(position_BS, denoiser.mask_id) if mask else known
        return pattern.continuation(ids_BS, position_BS, torch.full((1, 1), first)), position_BS[0]

    cache = Cache(context + max(WIDTHS))
    filled, index_N = view(0, context, mask=False)
    denoiser(filled, index_N[1:], cache=cache)
    for _ in range(REPEATS):
        for width in random.Random(0).sample(WIDTHS, len(WIDTHS)):
            shown, index_N = view(context, context + width, mask=denoiser.shift == "none")
            began = time.perf_counter()
            denoiser(shown, index_N, cache=cache)
            seconds[width].append(time.perf_counter() - began)
    return {width: statistics.median(found) for width, found in seconds.items()}


def growth(denoisers: dict[str, Denoiser], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens per second of long texts, and what a cache holds per token; of prompts that ask for nothing."""
    found = []
    for model, denoiser in denoisers.items():
        if denoiser.pattern.block_size is None:
            continue
        plan = read("autoregressive" if model == SOURCE else "block", [])
        prompt = denoiser.token_ids[40:56]
        for length in lengths:
            done = decode(denoiser, [prompt], replace(plan, stopper=Stopper(length, eos=False)))
            row = done.rows[0]
            found.append(
                {
                    "model": model,
                    "new_tokens": length,
                    "forwards": row.forwards,
                    "tokens_per_second": done.tokens_per_second,
                    "forwards_per_second": row.forwards / done.seconds,
                }
            )
    return found


def cache_bytes(denoiser: Denoiser) -> float:
    """What a cache holds per token, by filling one."""
    cache, length = Cache(64), 64
    position_BS = torch.arange(length)[None]
    ids_BS = torch.tensor([[denoiser.token_ids[0]] * length])
    with torch.no_grad():
        shown = denoiser.pattern.continuation(ids_BS, position_BS, torch.zeros(1, 1, dtype=torch.long))
        denoiser(shown, torch.arange(1, 2), cache=cache)
    return cache.nbytes / length


# What is written of it


def name(arm: dict[str, Any]) -> str:
    """A decoder with its threshold."""
    return arm["decoder"] if arm["threshold"] is None else f"{arm['decoder']}, τ = {arm['threshold']:g}"


def rate(arm: dict[str, Any], of: Iterable[int] | None = None) -> float:
    """Tokens per second, over some of the prompts."""
    chosen = list(range(len(arm["seconds"])) if of is None else of)
    return sum(arm["tokens"][n] for n in chosen) / sum(arm["seconds"][n] for n in chosen)


def per_forward(arm: dict[str, Any]) -> float:
    """TPF."""
    return sum(arm["tokens"]) / sum(arm["forwards"])


def matches(arm: dict[str, Any], tasks: list[str], task: str) -> float:
    """Exact match of a task, in percent."""
    right = [ok for ok, its in zip(arm["right"], tasks, strict=True) if its == task]
    return 100 * sum(right) / len(right)


def ratios(arm: dict[str, Any], baseline: dict[str, Any]) -> list[float]:
    """Tokens per second against the baseline's, in each part of the prompts."""
    count = len(arm["seconds"])
    edges = [count * part // PARTS for part in range(PARTS + 1)]
    parts = [range(first, last) for first, last in pairwise(edges) if first < last]
    return [rate(arm, part) / rate(baseline, part) for part in parts]


def equal(arm: dict[str, Any], baseline: dict[str, Any], tasks: list[str]) -> bool:
    """Whether exact match is within a point of the baseline's, or above, on each task."""
    return all(matches(arm, tasks, task) >= matches(baseline, tasks, task) - 1 for task in dict.fromkeys(tasks))


def baseline_of(found: dict[str, Any]) -> dict[str, Any]:
    """The faster of the AR source's two."""
    return max((arm for arm in found["arms"] if arm["model"] == SOURCE), key=rate)


def frontier_table(found: dict[str, Any]) -> str:
    """All arms, in Markdown; in bold what is within a point of the baseline on each task."""
    tasks, baseline = found["tasks"], baseline_of(found)
    named = list(dict.fromkeys(tasks))
    head = ["model", "decoder", *named, "TPF", "tokens per second", "× baseline (range)"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for arm in found["arms"]:
        spread = ratios(arm, baseline)
        speed = f"{rate(arm) / rate(baseline):.2f} ({min(spread):.2f} to {max(spread):.2f})"
        cells = [f"{per_forward(arm):.2f}", f"{rate(arm):,.0f}", "baseline" if arm is baseline else speed]
        if equal(arm, baseline, tasks):
            cells = [f"**{cell}**" for cell in cells]
        exact = [f"{matches(arm, tasks, task):.1f}" for task in named]
        lines.append(f"| `{arm['model']}` | {name(arm)} | {' | '.join([*exact, *cells])} |")
    return "\n".join(lines)


def limit_table(found: dict[str, Any]) -> str:
    """What a forward costs by its width, and the speed-up that TPF allows at that cost."""
    lines = ["| tokens shown | " + " | ".join(map(str, WIDTHS)) + " |", "|---" * (len(WIDTHS) + 1) + "|"]
    for model, seconds in found["widths"].items():
        costs = [seconds[str(width)] for width in WIDTHS]
        lines.append(f"| `{model}`, ms | " + " | ".join(f"{1000 * cost:.2f}" for cost in costs) + " |")
        lines.append(f"| `{model}`, × 1 token | " + " | ".join(f"{cost / costs[0]:.2f}" for cost in costs) + " |")
    return "\n".join(lines)


def growth_table(found: dict[str, Any]) -> str:
    """Long texts."""
    head = ["model", "new tokens", "forwards", "tokens per second", "forwards per second", "cache, bytes per token"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in found["growth"]:
        cells = [f"`{row['model']}`", f"{row['new_tokens']:,}", f"{row['forwards']:,}"]
        cells += [f"{row['tokens_per_second']:,.0f}", f"{row['forwards_per_second']:,.0f}"]
        cells.append(f"{found['cache_bytes'][row['model']]:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(found: dict[str, Any], path: Path) -> None:
    """Exact match over all tasks against tokens per second, relative to the baseline; a line over thresholds."""
    baseline = baseline_of(found)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    lines: dict[tuple[str, str], list[tuple[float, float, float | None]]] = {}
    for arm in found["arms"]:
        point = rate(arm) / rate(baseline), 100 * statistics.fmean(arm["right"]), arm["threshold"]
        lines.setdefault((arm["model"], arm["decoder"]), []).append(point)
    colors = dict(zip((SOURCE, *CONVERSIONS), ("black", "tab:blue", "tab:orange", "tab:green"), strict=True))
    markers = "osD^vPX*<>"
    decoders = list(dict.fromkeys(decoder for _, decoder in lines))
    for (model, decoder), points in lines.items():
        x, y, thresholds = zip(*points, strict=True)
        style = {"color": colors[model], "marker": markers[decoders.index(decoder) % len(markers)], "markersize": 5}
        axes.plot(x, y, label=f"{model}: {decoder}", **style)
        for a, b, threshold in zip(x, y, thresholds, strict=True):
            if threshold is not None and decoder == "block":
                axes.annotate(f"{threshold:g}", (a, b), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.axvline(1, color="gray", linewidth=0.5)
    axes.set_xlabel("tokens per second, relative to the faster AR baseline")
    axes.set_ylabel("exact match over all tasks, %")
    axes.legend(fontsize=7, loc="lower left", bbox_to_anchor=(1.0, 0.0))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def verdict(found: dict[str, Any]) -> str:
    """The fastest at equal accuracy, against the goals, with the limit that its forwards' cost sets."""
    tasks, baseline = found["tasks"], baseline_of(found)
    able = [arm for arm in found["arms"] if arm["model"] != SOURCE and equal(arm, baseline, tasks)]
    said = f"Baseline: `{baseline['decoder']}`, {rate(baseline):,.0f} tokens per second."
    if not able:
        return f"{said} No decoder is within a point of it on each task."
    best = max(able, key=rate)
    said += (
        f" Fastest within a point of it on each task: `{best['model']}` by {name(best)}, TPF "
        f"{per_forward(best):.2f}, {rate(best) / rate(baseline):.2f} × its tokens per second"
    )
    if (block := found["block_sizes"][best["model"]]) is None:
        return f"{said}."
    limit = per_forward(best) / (found["widths"][best["model"]][str(block)] / found["widths"][SOURCE]["1"])
    return f"{said}; TPF divided by what a forward of {block} tokens costs against one of 1 is {limit:.2f}."


def write(found: dict[str, Any]) -> None:
    """JSON, PNG, and the tables between the document's marks."""
    OUT.with_suffix(".json").write_text(json.dumps(found, indent=None, separators=(",", ":")) + "\n")
    picture(found, OUT.with_suffix(".png"))
    machine = found["machine"]
    began = (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, transformers "
        f"{machine['transformers']}; {len(found['tasks']):,} prompts, one at a time. {verdict(found)}"
    )
    tables = {"verdict": began, "frontier": frontier_table(found), "widths": limit_table(found)}
    text = OUT.read_text()
    for title, table in {**tables, "growth": growth_table(found)}.items():
        before, rest = text.split(f"<!-- {title} -->")
        text = f"{before}<!-- {title} -->\n{table}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
        print(table, end="\n\n")
    OUT.write_text(text)


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor()} ({os.cpu_count()} cores)"


def measure(per_task: int, lengths: Sequence[int]) -> dict[str, Any]:
    """Everything, as it goes into the JSON."""
    denoisers, tokenizer = {}, None
    for model in (SOURCE, *CONVERSIONS):
        if (RUNS / model / "model").is_dir():
            _, recipe, _ = restore(str(RUNS / model))
            denoisers[model], tokenizer = recipe.eval().denoiser, recipe.tokenizer
    data = compose(RECIPES / f"{CONVERSIONS[0]}.yaml")["data"]["init_args"]
    asked = prompts(data, tokenizer, per_task)
    longest = max(len(tokenizer(prompt.answer)["input_ids"]) for prompt in asked)
    entered = frontier(denoisers, tokenizer, asked, math.ceil(longest / AFTER + 1) * AFTER)
    context = round(statistics.fmean(len(prompt.ids) for prompt in asked))
    return {
        "machine": {
            "device": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "tasks": [prompt.task for prompt in asked],
        "arms": [arm.record() for arm in entered],
        "widths": {
            model: {str(width): cost for width, cost in widths(denoiser, context).items()}
            for model, denoiser in denoisers.items()
        },
        "block_sizes": {model: denoiser.pattern.block_size for model, denoiser in denoisers.items()},
        "growth": growth(denoisers, lengths),
        "cache_bytes": {model: cache_bytes(denoiser) for model, denoiser in denoisers.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="train what is missing, and measure nothing")
    parser.add_argument("--prompts", type=int, default=100, help="of each task")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of long texts, in tokens")
    parser.add_argument("--tables-only", action="store_true", help="from the JSON that is there")
    parser.add_argument("words", nargs="*", metavar="key=value", help="of all runs, for a trial")
    args = parser.parse_intermixed_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()
    if args.fit:
        fit(args.words)
    else:
        write(
            json.loads(OUT.with_suffix(".json").read_text())
            if args.tables_only
            else measure(args.prompts, args.lengths)
        )


if __name__ == "__main__":
    main()
