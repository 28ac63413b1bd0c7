"""`dlm eval` with the tasks of lm-evaluation-harness. Needs the extra `eval`."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from rich.console import Console
from rich.table import Table

from dlm_lightning.catalog import nearest
from dlm_lightning.data import conversations
from dlm_lightning.decode.plan import Plan
from dlm_lightning.generate import read, suited
from dlm_lightning.harness.model import Estimate, HarnessModel
from dlm_lightning.parsing import quiet
from dlm_lightning.reopening import restore

RESULT, SAMPLES = "lm_eval.json", "lm_eval_samples.jsonl"


def known_tasks(names: Iterable[str], include: str | None) -> TaskManager:
    """The harness's tasks, and those of a folder; ValueError, with the nearest name, for one that is not there."""
    if include and not Path(include).is_dir():
        raise ValueError(f"--include {include}: there is no such folder")
    manager = TaskManager(include_path=include)
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(f"there is no task {name}, here or in the harness{nearest(name, manager.all_tasks)}")
    return manager


def evaluate(
    folder: str,
    tasks: Sequence[str],
    *,
    plan: str | None = None,
    estimate: Estimate = Estimate(),
    include: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    batch: int = 8,
    precision: str = "32-true",
) -> Path:
    """Ask a run's newest checkpoint the harness's tasks; returns `lm_eval.json` in the run, the harness's own format.

    Beside the harness's results it holds `dlm_lightning`: decoding plan and how likelihoods were taken. `precision` is
    that of the weights, 32-true or bf16-true, whatever they were trained in. Under torchrun the ranks share out the
    questions. Raises ValueError or FileNotFoundError for what cannot be asked.
    """
    quiet()
    logging.getLogger("dlm_lightning").handlers = [logging.StreamHandler(sys.stderr)]
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    manager = known_tasks(tasks, include)
    run, recipe, step = restore(folder, f"--trainer.precision={precision}")
    denoiser, tokenizer = recipe.eval().denoiser, recipe.tokenizer
    template = conversations.template(getattr(recipe.trainer.datamodule, "chat_template", None))
    if chat and not (template or tokenizer.chat_template):
        raise ValueError("--chat: the run has no chat template, in data.chat_template or its tokenizer")
    chosen = read(plan or suited(denoiser), [])
    chosen.check(denoiser)
    with _ranks():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else None
        positions = getattr(denoiser.network.config, "max_position_embeddings", None) or sys.maxsize
        model = HarnessModel(
            denoiser.to(device or "cpu"), tokenizer, chosen, estimate, min(positions, 2048), batch, template
        )
        results = simple_evaluate(
            model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=shots,
            apply_chat_template=chat,
            bootstrap_iters=1000,
        )
    if results is None:  # of another rank
        return run / RESULT
    samples = results.pop("samples", {})
    results["dlm_lightning"] = {
        "run": str(run),
        "step": step,
        "pattern": vars(denoiser.pattern) | {"shift": denoiser.shift},
        "precision": precision,
        "likelihood": asdict(estimate),
        "plan": _described(chosen),
    }
    _write(run / RESULT, [json.dumps(results, indent=1, default=handle_non_serializable)])
    lines = ({"task": task, **sample} for task, its in samples.items() for sample in its)
    _write(run / SAMPLES, (json.dumps(line, default=handle_non_serializable) for line in lines))
    Console(highlight=False).print(_table(results["results"]))
    return run / RESULT


def _table(results: dict[str, dict[str, Any]]) -> Table:
    """A row per task and metric."""
    table = Table("task", "metric", "filter", "value", "standard error")
    for task, values in results.items():
        for name, value in values.items():
            metric, comma, filtered = name.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{filtered}")
                said = f"{error:.4f}" if isinstance(error, float) else ""
                table.add_row(task, metric, filtered, f"{value:.4f}" if isinstance(value, float) else str(value), said)
    return table


def _described(plan: Plan) -> dict[str, Any]:
    """A plan as its parts' classes and values."""
    return {
        name: {"class": type(part).__name__, **vars(part)} if hasattr(part, "__dict__") else part
        for name, part in vars(plan).items()
    }


@contextmanager
def _ranks() -> Iterator[None]:
    """Inside, the ranks of a launcher are connected."""
    own = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if own:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if own:
            dist.destroy_process_group()


def _write(path: Path, lines: Iterable[str]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    os.replace(beside, path)
