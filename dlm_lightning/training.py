"""What `dlm fit`, `resume` and `validate` do: a recipe becomes a Lightning run."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from dlm_lightning import catalog, checkpoint, interruption, runs
from dlm_lightning.loggers import MetricsCSV
from dlm_lightning.parsing import PLACEHOLDER, parse, quiet
from dlm_lightning.reopening import reopen, weights
from dlm_lightning.source import locate
from dlm_lightning.step_zero import step_zero

log = logging.getLogger(__name__)
PATIENCE = 10  # seconds that a rank waits for the one that started it to leave before it


def fit(recipe: str, overrides: Sequence[str], folder: str | None, ckpt_path: str | None) -> Path:
    """Train a recipe in a new run folder and return the folder; nothing is left of one that never began."""
    quiet()
    found = catalog.find(recipe)
    catalog.make_importable(found)
    config = catalog.compose(found.path)
    if {"--print_config", "--help", "-h"} & {word.split("=")[0] for word in overrides} or any(
        word.endswith(".help") for word in overrides
    ):
        parse(config, overrides, PLACEHOLDER)  # prints and exits
    start = Path(ckpt_path) if ckpt_path else None
    if start:
        checkpoint.read(start)
    run = runs.create(found.name, folder)
    cli = None
    try:
        cli = parse(config, overrides, run)
        if runs.is_first_process():
            (run / checkpoint.FOLDER).mkdir(exist_ok=True)
            (run / "drift").mkdir(exist_ok=True)
            note(run, found, cli, overrides)
        _train(cli, start)
    except FloatingPointError:  # of a step that was computed, and is noted in the run
        raise
    except BaseException:
        if runs.is_first_process() and not (cli and cli.trainer.global_step):
            runs.discard(run)
        raise
    return run


def note(run: Path, found: catalog.RecipeFile, cli: LightningCLI, overrides: Sequence[str], **facts: Any) -> None:
    """Write what a run is to its folder: where its recipe comes from, and the whole config."""
    origin = {"path": str(found.path), "origin": found.origin, "module": found.module}
    runs.write_origin(run, recipe=found.name, **origin, overrides=list(overrides), cwd=os.getcwd(), **facts)
    _pin(cli)
    cli.parser.save(cli.config, run / runs.CONFIG, skip_none=False, multifile=False, overwrite=True)


def _pin(cli: LightningCLI) -> None:
    """Make local paths absolute, and name the very folder that a source was found in, which may move on."""
    model, data = cli.config.model.init_args, cli.config.data.init_args
    if model.get("source") and Path(model.source).expanduser().is_dir():
        model.source = str(locate(model.source).resolve())
    cli.datamodule.pin(data)


def resume(folder: str, overrides: Sequence[str] = ()) -> Path:
    """Continue a run from its newest complete checkpoint, or from step 0 if it has none; refuses a finished run.

    Overrides hold for this time only: another number of devices, another strategy.
    """
    quiet()
    runs.check_trained(folder)
    run, cli = reopen(folder, *overrides)
    start = checkpoint.newest(run)
    steps = checkpoint.load(start / checkpoint.STATE)["global_step"] if start else 0
    if steps >= cli.trainer.max_steps:
        raise ValueError(f"{folder} is finished: it has made all {steps} of its {cli.trainer.max_steps} steps")
    if start is None:
        log.info("%s has no checkpoint yet; it starts again from step 0", folder)
    for logger in cli.trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.keep(steps)
    _train(cli, start)
    return run


def validate(folder: str) -> Path:
    """Validate a run's newest checkpoint and print what it measures."""
    quiet()
    run, cli = reopen(folder, "--trainer.logger=false")
    state = weights(folder, "to validate")
    cli.trainer.validate(cli.model, cli.datamodule, ckpt_path=state, weights_only=True)
    return run


def _train(cli: LightningCLI, start: Path | None) -> None:
    trainer = cli.trainer
    state = str(start / checkpoint.STATE) if start else None
    with runs.claimed(Path(trainer.default_root_dir)), interruption.listen():
        try:
            if start is None:
                trainer.validate(cli.model, cli.datamodule, verbose=False)
                if "val/ar_nll" in trainer.callback_metrics:  # not with limit_val_batches: 0
                    log.info(step_zero(cli.model, cli.datamodule, trainer.callback_metrics))
            trainer.fit(cli.model, cli.datamodule, ckpt_path=state, weights_only=True)
        except SystemExit as stop:
            _leave(cli, stop.code)
            raise
    part()
    if trainer.global_step < trainer.max_steps and not trainer.should_stop:
        raise ValueError(
            f"the run ended at step {trainer.global_step} of {trainer.max_steps}: the trainer's limit_train_batches, "
            "overfit_batches or max_epochs is shorter than its max_steps"
        )


def _leave(cli: LightningCLI, code: Any) -> None:
    """Say where a run stands that leaves after a signal; a rank that another one started, or speaks for, goes last."""
    trainer = cli.trainer
    run, launcher = Path(trainer.default_root_dir), trainer.strategy.launcher
    kept = checkpoint.by_step(run / checkpoint.FOLDER)
    since = f"step {kept[0][0]}" if kept else "the beginning"
    onward = f" at step {trainer.global_step}; `dlm resume {run}` goes on from {since}"
    if code != 1 and runs.is_first_process():
        print(f"dlm: stopped{onward if trainer.global_step else ' before the first step'}", file=sys.stderr)
    if trainer.global_step:
        part()
    elif isinstance(launcher, _SubprocessScriptLauncher):  # the other ranks may wait for this one
        launcher.kill(signal.SIGKILL)
    started = isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)
    if trainer.global_rank and (started or code == 1):  # a launcher ends all ranks when one has ended
        interruption.outlive(os.getppid(), PATIENCE)


def part() -> None:
    """End what connects the ranks; a process that exits with it is aborted now and then."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
