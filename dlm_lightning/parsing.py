"""A composed recipe, with overrides, as Lightning's trainer, model and data; refused if it says what no run can be."""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningDataModule
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from transformers.utils.logging import disable_progress_bar

from dlm_lightning import checkpoint, runs, strategies  # noqa: F401  (strategies registers fsdp2)
from dlm_lightning.errors import check_nulls, check_overrides
from dlm_lightning.module import Recipe
from dlm_lightning.precision import full_name

URL_PASSWORD = re.compile(r"://[^/\s@:]*:[^/\s@]+@")
FROM_ENVIRONMENT = (
    "a value from the environment (oc.env) would be written to config.yaml; write the value itself, and leave secrets "
    "to the library that reads them from the environment, such as HF_TOKEN"
)
NOT_MOVED = "trainer.default_root_dir is the run folder; name it by --run DIR"
PLACEHOLDER = "runs/RECIPE/NUMBER"
WITHOUT_DEVICES = [  # to look at a recipe or a run on a machine that could not train it
    f"--trainer.{setting}"
    for setting in ("accelerator=cpu", "devices=1", "num_nodes=1", "strategy=auto", "precision=32-true", "logger=false")
]


def quiet() -> None:
    """Leave only what a user can act on: no tips, no notes on hardware that is not there, no deprecations of others."""
    warnings.filterwarnings("ignore", module=r"(lightning|torch|transformers|jsonargparse|pydantic)\b.*")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    disable_progress_bar()
    ours = logging.getLogger("dlm_lightning")
    ours.setLevel(logging.INFO if getattr(rank_zero_only, "rank", 0) == 0 else logging.WARNING)
    ours.handlers = [logging.StreamHandler(sys.stdout)]


class _CLI(LightningCLI):
    """A parsed recipe, which is refused before anything is made of it if it says what no run can be."""

    def before_instantiate_classes(self) -> None:
        check_nulls(self.config)
        trainer = self.config.trainer
        if trainer.use_distributed_sampler:
            raise ValueError("trainer.use_distributed_sampler must be false: the data module shares out its own stream")
        if trainer.val_check_interval == 0:
            raise ValueError(
                "trainer.val_check_interval must not be 0; trainer.limit_val_batches=0 leaves validation out"
            )
        if not isinstance(trainer.val_check_interval, int | float | None):
            raise ValueError(
                "trainer.val_check_interval must be a number, of micro-batches: by time no run repeats another"
            )
        if trainer.check_val_every_n_epoch is not None and trainer.check_val_every_n_epoch < 1:
            raise ValueError("trainer.check_val_every_n_epoch must be at least 1 or null: validation is by step")
        full_name(trainer.precision)  # Lightning takes others, and makes bf16-mixed of 16-mixed on a CPU
        if trainer.max_time is not None:
            raise ValueError("trainer.max_time must be null: a run's length is its max_steps; SIGUSR1 stops it earlier")


def parse(config: dict[str, Any], overrides: Sequence[str], run: Path | str) -> LightningCLI:
    """Parse a composed recipe and instantiate its trainer, model and data.

    `key=value` is `--key=value`; everything that starts with a dash goes to LightningCLI as it is.
    """
    OmegaConf.register_resolver("oc.env", _no_environment, replace=True)
    yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))
    for section in ("model", "data", "trainer"):
        if not isinstance(config.get(section, {}), dict):
            raise ValueError(f"{section}: expected keys and values, got {config[section]}")
    options = [f"--{word}" if not word.startswith("-") and "=" in word else word for word in overrides]
    if any(option.startswith("--trainer.default_root_dir=") for option in options):
        raise ValueError(NOT_MOVED)
    cli = _CLI(
        Recipe,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        args=[f"--config={yaml.safe_dump(config, sort_keys=False)}", f"--trainer.default_root_dir={run}", *options],
        auto_configure_optimizers=False,
        save_config_callback=None,
        parser_kwargs={"parser_mode": "omegaconf+", "allow_abbrev": False, "exit_on_error": False, "prog": "dlm fit"},
    )
    check_overrides(options, cli.config)
    if cli.config.trainer.default_root_dir != str(run):
        raise ValueError(NOT_MOVED)
    _check_written(cli, Path(run))
    environment = cli.trainer._accelerator_connector.cluster_environment
    if isinstance(environment, LightningEnvironment) and cli.trainer.num_nodes > 1 and "NODE_RANK" not in os.environ:
        raise ValueError(f"trainer.num_nodes={cli.trainer.num_nodes} needs a launcher on each node: torchrun, or SLURM")
    if isinstance(cli.trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError("trainer.strategy: processes that are spawned bring nothing back; take ddp or fsdp2")
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False  # Lightning would save inside the signal's handler, in mid-step
    trainer: Any = cli.trainer
    trainer._signal_connector.register_signal_handlers = lambda: None  # see interruption
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # of those handlers, and it waits for the GPU
    if ModelCheckpoint.__name__ not in str(cli.config.trainer.callbacks):  # Lightning adds one where nothing saves
        trainer.callbacks = [callback for callback in trainer.callbacks if type(callback) is not ModelCheckpoint]
    if type(cli.trainer.strategy).save_checkpoint is Strategy.save_checkpoint:
        cli.trainer.strategy.checkpoint_io = checkpoint.ElasticIO()
    return cli


def _no_environment(*_: Any) -> None:
    raise ValueError(FROM_ENVIRONMENT)


def _check_written(cli: LightningCLI, run: Path) -> None:
    """Refuse what would be written outside of the run folder, and a password that config.yaml would keep."""
    if URL_PASSWORD.search(cli.parser.dump(cli.config, skip_validation=True)):
        raise ValueError(
            "a URL with a password in it would be written to config.yaml; leave it to the store's own login"
        )
    for logger in cli.trainer.loggers:
        own = inspect.signature(type(logger)).parameters.get("save_dir")
        if own and logger.save_dir == own.default:  # not of the recipe: `.` of W&B's, which asks for one override only
            continue
        for place in (logger.save_dir, logger.log_dir):
            if place:
                runs.check_inside(run, place, f"trainer.logger ({type(logger).__name__})")
    for callback in cli.trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            file = Path(callback.dirpath or run) / (callback.filename or "")
            runs.check_inside(run, file, f"trainer.callbacks ({type(callback).__name__})")
