"""`dlm summary`: what a run did, as tables: likelihood before and after, drift, a continuation, where things lie."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dlm_lightning import checkpoint, runs
from dlm_lightning.callbacks.weight_drift import FOLDER, TABLE, last
from dlm_lightning.decode.decoder import decode
from dlm_lightning.decode.plan import Plan
from dlm_lightning.decode.reuse import exact
from dlm_lightning.decode.stopper import Stopper
from dlm_lightning.drift_between import drift_table
from dlm_lightning.module import Recipe
from dlm_lightning.parsing import quiet
from dlm_lightning.reopening import restore
from dlm_lightning.source import SAVED_MODEL

PROMPT = "def __init__(self, name, value):\n    "
NEW_TOKENS = 32
MASKED = "▒"
MEANING = {
    "nelbo": "NELBO, nats per token (this pattern's bound)",
    "masked_ce": "masked cross-entropy, unweighted",
    "ar_nll": "next-token NLL, read causally as the source is",
}


def summarize(folder: str) -> None:
    """Print a run's tables; raises FileNotFoundError for a folder that is no run or has no checkpoint."""
    quiet()
    run, recipe, steps = restore(folder)
    recipe.eval()  # in training, activation checkpointing leaves the decoder's cache empty
    console = Console(highlight=False)
    if (measured := likelihood(run, steps)).row_count:
        console.print(measured)
    table = run / FOLDER / TABLE
    if any(table.glob("*.parquet")):
        console.print(drift(table))
    console.print(filling(recipe))
    console.print(places(run))


def likelihood(run: Path, steps: int) -> Table:
    """Validation figures at the first validation and at the last one of the checkpoint's steps, from metrics.csv."""
    rows: list[dict[str, str]] = []
    if (run / runs.METRICS).is_file():
        with (run / runs.METRICS).open(newline="") as file:
            found = [row for row in csv.DictReader(file) if row.get("val/nelbo")]
            rows = [row for row in found if int(row["step"]) <= steps]
    first = "before" if rows and rows[0]["step"] == "0" else "first measured"
    table = Table("on held-out files", first, "after", title=f"likelihood at step {steps}", title_justify="left")
    for name, meaning in MEANING.items():
        if rows and rows[0].get(f"val/{name}"):
            table.add_row(meaning, *(f"{float(row[f'val/{name}']):.3f}" for row in (rows[0], rows[-1])))
    return table


def drift(path: Path) -> Table:
    """Weight drift from the AR source per module group, at the last measured step."""
    step, groups = last(path)
    return drift_table(groups, f"weight drift from the AR source, step {step}")


def filling(recipe: Recipe) -> Text:
    """A continuation of the prompt while its masked tokens are being filled in, up to eight moments of it."""
    ids = recipe.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    canvases: list[list[int]] = []
    plan = Plan(cache=exact(recipe.denoiser), stopper=Stopper(NEW_TOKENS, eos=False))
    decoded = decode(recipe.denoiser, [ids], plan, watch=lambda canvas: canvases.append(canvas.visible(0)))
    text = Text(f"a continuation, {MASKED} is a masked token ({decoded.tokens_per_forward:.2f} tokens per forward)\n")
    for forward in sorted({round(x) for x in torch.linspace(0, len(canvases) - 1, 8).tolist()}):
        text.append(f"\n  after forward {forward + 1}\n", style="dim")
        text.append("".join(f"    {line}\n" for line in _canvas(recipe, canvases[forward]).splitlines()))
    return text


def _canvas(recipe: Recipe, canvas: list[int]) -> str:
    text = ""
    known: list[int] = []
    for token in canvas:
        if token == recipe.mask_id:
            text, known = text + recipe.tokenizer.decode(known) + MASKED, []
        else:
            known.append(token)
    return text + recipe.tokenizer.decode(known)


def places(run: Path) -> Table:
    """What lies where in a run folder."""
    contents = {
        runs.CONFIG: "the resolved configuration",
        runs.METRICS: "everything that was logged",
        "tensorboard": "the same for `tensorboard --logdir`",
        checkpoint.FOLDER: "what `dlm resume` continues from",
        FOLDER: "drift.parquet and a heat map per measured step",
        "samples": "continuations at each validation",
        SAVED_MODEL: "the finished network as a Hugging Face folder",
    }
    table = Table(title=f"where everything lies: {run}", title_justify="left", show_header=False)
    for name, about in contents.items():
        if (run / name).exists():
            table.add_row(name, about)
    return table
