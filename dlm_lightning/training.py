"""What `dlm fit`, `resume` and `validate` do: a recipe becomes a Lightning run."""

from __future__ import annotations

import inspect
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningDataModule
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from transformers.utils.logging import disable_progress_bar

from dlm_lightning import catalog, checkpoint, interruption, runs, strategies  # noqa: F401  (strategies registers fsdp2)
from dlm_lightning.errors import check_nulls, check_overrides
from dlm_lightning.loggers import MetricsCSV
from dlm_lightning.module import Recipe
from dlm_lightning.precision import full_name
from dlm_lightning.source import SAVED_MODEL, Source, locate
from dlm_lightning.step_zero import step_zero

log = logging.getLogger(__name__)
URL_PASSWORD = re.compile(r"://[^/\s@:]*:[^/\s@]+@")
FROM_ENVIRONMENT = (
    "a value from the environment (oc.env) would be written to config.yaml; write the value itself, and leave secrets "
    "to the library that reads them from the environment, such as HF_TOKEN"
)
NOT_MOVED = "trainer.default_root_dir is the run folder; name it by --run DIR"
PATIENCE = 10  # seconds that a rank waits for the one that started it to leave before it
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
            (run / "checkpoints").mkdir(exist_ok=True)
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


def weights(folder: str, purpose: str) -> str | None:
    """The state of a run's newest checkpoint; None for an imported model, whose weights are its source's.

    FileNotFoundError for a run that has none yet.
    """
    run, _ = runs.open_run(folder)
    start = checkpoint.newest(run)
    if start is None and not runs.is_imported(folder):
        raise FileNotFoundError(f"{folder} has no complete checkpoint {purpose}")
    return str(start / checkpoint.STATE) if start else None


def restore(folder: str, *overrides: str, path: Path | None = None) -> tuple[Path, Recipe, int]:
    """A run folder, its network on the CPU with the weights of a checkpoint, and its step.

    The checkpoint is at `path`, or the newest complete one; an imported model has none, and its source's weights.
    """
    run, cli = reopen(folder, *WITHOUT_DEVICES, *overrides)
    recipe: Recipe = cli.model
    state = path / checkpoint.STATE if path else weights(folder, "to take weights from")
    if recipe.source is None:
        recipe.tokenizer = _tokenizer(run, cli.datamodule)
    recipe.trainer = cli.trainer  # whose precision the network is built in
    recipe.configure_model()
    return run, recipe, checkpoint.load_weights(recipe, Path(state).parent)["global_step"] if state else 0


def _tokenizer(run: Path, data: Any) -> Any:
    """That of the finished model, or else of the data, for a model that is trained from scratch."""
    if (run / SAVED_MODEL).is_dir():
        return Source(str(run / SAVED_MODEL), weights=False).tokenizer()
    return data.trained_tokenizer()


def reopen(folder: str, *overrides: str, into: str | None = None) -> tuple[Path, LightningCLI]:
    """A run folder's trainer, model and data as its config describes them, wherever the folder lies now.

    What the trainer writes goes there, or `into` another folder.
    """
    run, origin = runs.open_run(folder)
    catalog.make_importable(
        catalog.RecipeFile(origin["recipe"], Path(origin["path"]), origin["origin"], origin["module"])
    )
    config = yaml.safe_load((run / runs.CONFIG).read_text())
    config = _moved(config, config["trainer"].pop("default_root_dir"), str(run))
    return run, parse(config, overrides, into or run)


def _moved(value: Any, then: str, now: str) -> Any:
    """A config in which what lay in the folder `then` lies in `now`."""
    if isinstance(value, dict):
        return {key: _moved(item, then, now) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, then, now) for item in value]
    inside = isinstance(value, str) and (value == then or value.startswith(f"{then}/"))
    return now + value[len(then) :] if inside else value


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
