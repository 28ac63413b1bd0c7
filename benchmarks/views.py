"""Do several views of a row pay? The gradient's variance from masks × the seconds of a step, against more rows.

    python benchmarks/views.py               # needs runs/ar_source (make demo); a conversion that is there is kept
    python benchmarks/views.py --table-only  # only write the tables of docs/results/views.md from its JSON
    python benchmarks/views.py --out DIR     # write views.md and views.json somewhere else

Each recipe is trained for half of its steps from the embedded source, with one view, and measured at these weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dlm_lightning import checkpoint
from dlm_lightning.bench.record import named
from dlm_lightning.bench.timing import take_turns
from dlm_lightning.gradient_noise import gradient_noise
from dlm_lightning.module import Recipe
from dlm_lightning.optimizer import adamw
from dlm_lightning.parsing import WITHOUT_DEVICES, quiet
from dlm_lightning.reopening import reopen
from dlm_lightning.view import Batch

ROOT = Path(__file__).parents[1]
RECIPES = ("block_causal", "complementary_mask")
STEPS = 225  # half of the recipes' own
RUNS = Path("runs/views")
OUT = ROOT / "docs" / "results"
FACTORS = (1, 2, 4)  # views of a row, and times the rows


def fit(recipe: str, trial: list[str]) -> None:
    """Train what is to be measured; continues a run that was cut off."""
    run = RUNS / recipe
    if (run / "checkpoints" / f"step={STEPS}").exists():
        return
    budget = [f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS}"]
    words = ["resume", str(run)] if run.is_dir() else ["fit", recipe, *budget, *trial, "--run", str(run)]
    subprocess.run([sys.executable, "-m", "dlm_lightning.cli", *words], check=True)


def opened(recipe: str, count: int) -> tuple[Recipe, list[Batch]]:
    """The half-trained recipe and micro-batches of its data."""
    alone = ("--trainer.callbacks=[]", "--trainer.limit_val_batches=1")
    run, cli = reopen(str(RUNS / recipe), *WITHOUT_DEVICES, *alone)
    state = run / "checkpoints" / f"step={STEPS}" / checkpoint.STATE
    cli.trainer.validate(cli.model, cli.datamodule, ckpt_path=str(state), weights_only=True, verbose=False)
    return cli.model, list(islice(cli.datamodule.train_dataloader(), count))


def variances(recipe: Recipe, batches: Sequence[Batch], draws: int) -> list[dict[str, float]]:
    """For each pair of batches the traces of the gradient's covariance: `data`, and from masks by number of views."""
    found = []
    for first in range(0, len(batches), 2):
        pair: dict[str, float] = {}
        for views in FACTORS:
            recipe.views = views
            measured = gradient_noise(recipe, batches[first : first + 2], draws)
            pair |= {str(views): measured.noise, "data": measured.data}  # least uncertain with the most views
        found.append(pair)
    return found


def seconds(recipe: Recipe, batches: Sequence[Batch], repeats: int) -> dict[str, list[float]]:
    """Of a step, optimizer included, with so many views of a row, and with so many times the rows; interleaved."""
    optimizer = adamw(recipe.denoiser, 0.0, recipe.lr_scale, 0.0, recipe.betas)  # moves nothing

    def step(views: int, batch: Batch) -> None:
        recipe.views = views
        recipe.training_step(batch, 0).backward()
        optimizer.step()
        optimizer.zero_grad()

    more = {k: Batch(*(torch.cat(tensors) for tensors in zip(*batches[:k], strict=True))) for k in FACTORS}
    arms = {f"{k} × views": partial(step, k, more[1]) for k in FACTORS}
    arms |= {f"{k} × rows": partial(step, 1, more[k]) for k in FACTORS[1:]}
    return take_turns(arms, repeats, warm_up=1)


def measure(pairs: int, draws: int, repeats: int) -> dict[str, Any]:
    """Everything, as it goes into the JSON."""
    found: dict[str, Any] = {
        "machine": {
            "device": named(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "asked": {"pairs of batches": pairs, "draws": draws, "repeats": repeats, "steps": STEPS},
        "recipes": {},
    }
    for name in RECIPES:
        recipe, batches = opened(name, max(2 * pairs, *FACTORS))
        rows, length = batches[0].ids_BL.shape
        found["recipes"][name] = {
            "rows": rows,
            "length": length,
            "seconds": seconds(recipe, batches, repeats),
            "variances": variances(recipe, batches[: 2 * pairs], draws),
        }
        print(json.dumps(found["recipes"][name]), flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """In Markdown, all relative to one view: medians, and the range over pairs of batches or over repetitions."""
    lines = [
        "| recipe | step | variance from masks | seconds | reduction per second, masks | masks and data |",
        "|---|---|---|---|---|---|",
    ]
    for name, its in found["recipes"].items():
        pairs, taken = its["variances"], its["seconds"]
        data = statistics.median(pair["data"] / pair["1"] for pair in pairs)  # in units of the variance from masks
        for arm, own in taken.items():
            k, _, what = arm.split()
            slower = [a / b for a, b in zip(own, taken["1 × views"], strict=True)]
            noise = [pair[k] / pair["1"] if what == "views" else 1 / int(k) for pair in pairs]
            least, cost = statistics.median(noise), statistics.median(slower)
            whole = (least + (data if what == "views" else data / int(k))) / (1 + data)
            cells = [f"`{name}`", arm, spread(noise, what == "views"), spread(slower)]
            cells += [f"{1 / (least * cost):.2f} ×", f"{1 / (whole * cost):.2f} ×"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], measured: bool = True) -> str:
    """Median and range; what is not measured is the same everywhere."""
    middle = f"{statistics.median(values):.2f}"
    return f"{middle} ({min(values):.2f} to {max(values):.2f})" if measured else middle


def heading(found: dict[str, Any]) -> str:
    """What was measured on what."""
    machine, asked = found["machine"], found["asked"]
    shapes = "; ".join(f"`{name}` {its['rows']} × {its['length']} tokens" for name, its in found["recipes"].items())
    medians = (
        f"`{name}` {statistics.median(its['seconds']['1 × views']):.3f} s a step, variance from data "
        f"{statistics.median(pair['data'] / pair['1'] for pair in its['variances']):.2f} × that from masks"
        for name, its in found["recipes"].items()
    )
    return (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, float32, {shapes}; "
        f"{asked['pairs of batches']} pairs of batches, {asked['draws']} draws of the noise of each, "
        f"{asked['repeats']} timed steps of each kind. With one view: {'; '.join(medians)}."
    )


def write(found: dict[str, Any], folder: Path) -> None:
    """The JSON, and the tables between the marks of the document."""
    (folder / "views.json").write_text(json.dumps(found, indent=1) + "\n")
    out = folder / "views.md"
    text = out.read_text() if out.is_file() else (OUT / "views.md").read_text()
    for title, part in {"heading": heading(found), "table": table(found)}.items():
        before, rest = text.split(f"<!-- {title} -->")
        text = f"{before}<!-- {title} -->\n{part}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
        print(part, end="\n\n")
    out.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="of batches whose gradients' variance is measured")
    parser.add_argument("--draws", type=int, default=4, help="of the noise of each batch")
    parser.add_argument("--repeats", type=int, default=8, help="timed steps of each kind")
    parser.add_argument("--table-only", action="store_true", help="from the JSON that is there")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder of views.md and views.json")
    parser.add_argument("words", nargs="*", metavar="key=value", help="of all runs, for a trial")
    args = parser.parse_intermixed_args()
    quiet()
    if args.table_only:
        write(json.loads((args.out / "views.json").read_text()), args.out)
        return
    for recipe in RECIPES:
        fit(recipe, args.words)
    write(measure(args.pairs, args.draws, args.repeats), args.out)


if __name__ == "__main__":
    main()
