"""`dlm eval`: everything that runs are compared by, measured on a run's newest checkpoint and kept in the run."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from warnings import warn

import torch
import transformers
import yaml
from lightning.pytorch.cli import LightningCLI
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor import DTensor

from dlm_lightning import __version__, checkpoint, runs
from dlm_lightning.callbacks.representation import Representation
from dlm_lightning.callbacks.yardstick import Yardstick
from dlm_lightning.decode.decoder import decode
from dlm_lightning.decode.plan import Plan
from dlm_lightning.decode.selector import Threshold
from dlm_lightning.decode.stopper import Stopper
from dlm_lightning.generate import read, suited
from dlm_lightning.gradient_noise import gradient_noise
from dlm_lightning.module import Recipe
from dlm_lightning.parsing import quiet
from dlm_lightning.reopening import reopen, weights
from dlm_lightning.tasks import Question, check_names, questions
from dlm_lightning.view import AUTOREGRESSIVE

log = logging.getLogger(__name__)
RESULT = "evaluation.json"
FORMAT = 1  # of what is measured; what another one says is measured anew
ONE_DEVICE = ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto", "--trainer.logger=false"]
ONE_BY_ONE = "one by one"  # an autoregressive model's decoder
DECODERS = {  # of the frontier, around each model's own plan
    **{f"threshold {x}": Threshold(x) for x in (0.5, 0.7, 0.9)},
    **{f"{k} per forward": Threshold(1e-9, at_most=k) for k in (1, 2, 4, 8)},
}
BATCH = 32  # prompts decoded together
GRADIENT_BATCHES = 4
SAMPLES, SAMPLE_TOKENS = 3, 48


def evaluate(folder: str, tasks: Sequence[str] | None = None, prompts: int = 32, overrides: Sequence[str] = ()) -> Path:
    """Measure a run's newest checkpoint, write `evaluation.json` in the run, print its tables; returns the file.

    `prompts` is how many questions of each task are asked; 0 asks none. Overrides hold for this time only; without any
    it takes one device. Raises ValueError or FileNotFoundError for a run or task that is not there.
    """
    quiet()
    check_asked(tasks, prompts)
    began = time.perf_counter()
    run, cli = reopen(folder, *ONE_DEVICE, *overrides)
    state = weights(folder, "to measure")
    asked = questions(cli.datamodule, list(tasks) if tasks else None, prompts) if prompts else {}
    found = _likelihood(cli, state)
    recipe: Recipe = cli.model
    recipe.eval()
    alone = not any(isinstance(parameter, DTensor) for parameter in recipe.parameters())
    if not alone:
        log.info("tasks and gradients are left out: they need a network that is whole on one device")
    if alone and cli.trainer.is_global_zero:
        batches = list(islice(cli.datamodule.train_dataloader(), GRADIENT_BATCHES))
        if recipe.pattern != AUTOREGRESSIVE and len(batches) > 1:
            moved = [type(batch)(*(tensor.to(recipe.device) for tensor in batch)) for batch in batches]
            found["gradient"] = gradient_noise(recipe, moved)._asdict()
        found["tasks"] = list(_tasks(recipe, asked))
        found["samples"] = _samples(recipe, cli.datamodule.prompts(SAMPLES))
    result = {
        "format": FORMAT,
        "asked": {"tasks": list(tasks) if tasks else None, "prompts": prompts, "overrides": list(overrides)},
        "step": checkpoint.load(Path(state))["global_step"] if state else 0,
        "pattern": vars(recipe.pattern) | {"shift": recipe.shift},
        "work": {"forward_tokens_per_step": forward_tokens_per_step(run, recipe)},
        **found,
        "seconds": round(time.perf_counter() - began, 1),
        "with": {
            "dlm_lightning": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if recipe.device.type == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
        },
    }
    if cli.trainer.is_global_zero:
        beside = run / f".{RESULT}.{os.getpid()}"
        beside.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(beside, run / RESULT)
        show(result)
    return run / RESULT


def check_asked(tasks: Sequence[str] | None, prompts: int) -> None:
    """Raise ValueError for a number of questions, or a task, that cannot be asked."""
    if prompts < 0:
        raise ValueError(f"--prompts must be at least 0, not {prompts}")
    check_names(tasks or ())


def forward_tokens_per_step(run: Path, recipe: Recipe) -> int:
    """Tokens that pass the network in an optimizer step as the run was trained, whatever it is measured on."""
    config = yaml.safe_load((run / runs.CONFIG).read_text())
    data, trainer = config["data"]["init_args"], config["trainer"]
    devices = trainer["devices"] if isinstance(trainer["devices"], int) else 1
    rows = data["batch_size"] * trainer["accumulate_grad_batches"] * max(1, devices) * trainer["num_nodes"]
    return rows * data["row_length"] * recipe.copies


def _likelihood(cli: LightningCLI, state: str | None) -> dict[str, Any]:
    """What a validation and the callbacks log, `a/b/c` as nested keys."""
    trainer: Any = cli.trainer
    trainer.callbacks = [
        *(callback for callback in trainer.callbacks if not type(callback).__module__.startswith("dlm_lightning")),
        Yardstick(),
        Representation(),
    ]
    trainer.validate(cli.model, cli.datamodule, ckpt_path=state, weights_only=True, verbose=False)
    nested: dict[str, Any] = {}
    for name, value in trainer.callback_metrics.items():
        *path, last = name.split("/")
        place = nested
        for key in path:
            place = place.setdefault(key, {})
        place[last] = float(value)
    return nested


def _tasks(recipe: Recipe, asked: dict[str, list[Question]]) -> Iterator[dict[str, Any]]:
    """A record per task and decoder: counts of what is right, tokens, forwards, seconds."""
    plan = read(suited(recipe.denoiser), [])
    plans = {name: replace(plan, selector=selector) for name, selector in DECODERS.items()}
    plans = {ONE_BY_ONE: plan} if recipe.pattern == AUTOREGRESSIVE else plans
    for task, its in asked.items():
        for name, its_plan in plans.items():
            yield {"task": task, "decoder": name, "count": len(its), **ask(recipe, its, its_plan)}


def ask(recipe: Recipe, its: list[Question], plan: Plan) -> dict[str, Any]:
    """Ask questions of one task: counts of what is right, by its name, and tokens, forwards and seconds."""
    ids, answers = (
        [recipe.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        for texts in ([q.prompt for q in its], [q.answer for q in its])
    )
    strings = ("\n",) if any(q.before for q in its) else ()
    plan = replace(plan, stopper=Stopper(max(map(len, answers)) + 2, strings=strings))
    tokenizer, sums = recipe.tokenizer, {"tokens": 0, "forwards": 0, "seconds": 0.0}
    for first in range(0, len(ids), BATCH):
        options: dict[str, Any] = {"text": tokenizer.decode, "eos_ids": [tokenizer.eos_token_id]}
        decoded = decode(recipe.denoiser, ids[first : first + BATCH], plan, **options)
        sums["tokens"] += decoded.tokens
        sums["forwards"] += decoded.forwards
        sums["seconds"] += decoded.seconds
        for question, row in zip(its[first:], decoded.rows, strict=False):
            text = tokenizer.decode(row.new_ids, skip_special_tokens=True)
            for name, right in question.mark(text).items():
                sums[name] = sums.get(name, 0) + right
    return sums


def _samples(recipe: Recipe, prompts: list[list[int]]) -> list[dict[str, str]]:
    plan = replace(read(suited(recipe.denoiser), []), stopper=Stopper(SAMPLE_TOKENS))
    rows = decode(recipe.denoiser, prompts, plan, eos_ids=[recipe.tokenizer.eos_token_id]).rows if prompts else []
    texts = (recipe.tokenizer.decode(row.new_ids, skip_special_tokens=True) for row in rows)
    return [{"prompt": recipe.tokenizer.decode(ids), "text": text} for ids, text in zip(prompts, texts, strict=True)]


def show(result: dict[str, Any]) -> None:
    """Print what was measured."""
    console = Console(highlight=False)
    table = Table("future", *(result["bound"]["masked"]), title="block-wise bound by block size, nats per token")
    table.title_justify = "left"
    for future, sizes in result["bound"].items():
        table.add_row(future, *(f"{sizes[size]:.3f}" if size in sizes else "" for size in result["bound"]["masked"]))
    console.print(table)
    if not result.get("tasks"):
        return
    table = Table("task", "decoder", "asked", "exact match", "TPF", title="tasks", title_justify="left")
    for row in result["tasks"]:
        per_forward = row["tokens"] / max(1, row["forwards"])
        exact = f"{row['exact'] / row['count']:.1%}" if row["count"] else ""
        table.add_row(row["task"], row["decoder"], str(row["count"]), exact, f"{per_forward:.2f}")
    console.print(table)


def load(run: Path) -> dict[str, Any] | None:
    """What was measured on a run, if it is of the newest checkpoint; a file that cannot be read is said and ignored."""
    if not (run / RESULT).is_file():
        return None
    try:
        found = json.loads((run / RESULT).read_text())
        step, known = found["step"], found["format"] == FORMAT and bool(found["asked"])
    except (ValueError, TypeError, KeyError):
        warn(f"{run / RESULT} is damaged or of another version; `dlm eval {run}` measures the run again", stacklevel=2)
        return None
    kept = checkpoint.by_step(run / checkpoint.FOLDER)
    return found if known and (not kept or step == kept[0][0]) else None
