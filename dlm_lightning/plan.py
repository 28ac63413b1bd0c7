"""`dlm plan`: what a recipe will take, before anything is loaded: parameters, memory, tokens, FLOPs.

Shapes: B rows, L tokens per copy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dlm_lightning import catalog
from dlm_lightning.data.token_data import TokenData
from dlm_lightning.denoiser import Denoiser
from dlm_lightning.drift import place
from dlm_lightning.flops import needed
from dlm_lightning.module import Recipe
from dlm_lightning.noise import STRATA, uniforms
from dlm_lightning.parsing import PLACEHOLDER, WITHOUT_DEVICES, parse, quiet
from dlm_lightning.precision import full_name
from dlm_lightning.rehearsal import Memory, Rehearsal, per_device, rehearse
from dlm_lightning.source import Source
from dlm_lightning.view import Batch

DRAWS = 16 * STRATA  # rows whose noise is drawn to know how many tokens are scored on average


class Machine(NamedTuple):
    """What a recipe asks to run on; `memory` is that of one device in bytes, None if it is not here."""

    gpus: bool
    devices: int
    strategy: str
    precision: str
    memory: int | None


class Tokens(NamedTuple):
    """Tokens of one micro-batch: of the corpus, terms of the loss on average, and through the network."""

    data: int
    scored: float
    forward: int


class Prepared(NamedTuple):
    """A recipe that can build its network, with the trainer and the data module that its size depends on."""

    name: str
    machine: Machine
    recipe: Recipe
    data: TokenData
    trainer: Any


@dataclass(frozen=True)
class Plan:
    """What a recipe will take; `denoiser` is built of fake tensors."""

    name: str
    machine: Machine
    denoiser: Denoiser
    rehearsal: Rehearsal
    memory: Memory
    tokens: Tokens
    accumulate: int
    steps: int


def show(name: str, overrides: Sequence[str]) -> None:
    """Print a recipe's plan."""
    console = Console(highlight=False)
    console.print(tables(plan(name, overrides)))


def plan(name: str, overrides: Sequence[str]) -> Plan:
    """Plan a recipe for the machine that it asks for; of its source, only config and tokenizer are read.

    Raises ValueError or FileNotFoundError, naming the key, for a recipe that could not run.
    """
    name, machine, recipe, data, trainer = prepare(name, overrides)
    scored = scored_per_row(recipe, data.row_length)
    batch = rows(data.batch_size, data.row_length)
    copies = recipe.noisy(batch, recipe.pattern)
    forward = recipe.show(batch, copies, recipe.pattern).ids_BS.numel()
    tokens = Tokens(batch.ids_BL.numel(), scored * data.batch_size, forward)
    done = rehearse(
        recipe,
        batch,
        copies,
        max(1, round(tokens.scored)),
        accumulate=trainer.accumulate_grad_batches,
        gpu=machine.gpus,
    )
    memory = per_device(done, machine.strategy, machine.devices, recipe.denoiser)
    return Plan(
        name, machine, recipe.denoiser, done, memory, tokens, trainer.accumulate_grad_batches, trainer.max_steps
    )


def prepare(name: str, overrides: Sequence[str], here: bool = False) -> Prepared:
    """Parse a recipe for a network of random weights: of its source, only config and tokenizer are read.

    The trainer works on a CPU, in the precision that is asked for; `here`, on one device of the kind that is asked for.
    """
    quiet()
    found = catalog.find(name)
    config = catalog.compose(found.path)
    catalog.make_importable(found)
    machine = asked(config, overrides)
    own = [*WITHOUT_DEVICES, f"--trainer.precision={machine.precision}"]
    if here and machine.gpus:
        own.append("--trainer.accelerator=gpu")
    cli = parse(config, [*overrides, *own], PLACEHOLDER)
    recipe, data = cli.model, cli.datamodule
    trainer: Any = cli.trainer
    if trainer.max_steps < 1:
        raise ValueError("trainer.max_steps must be set: the run's length decides its schedule and its stream")
    recipe.trainer = data.trainer = trainer
    trainer.datamodule = data
    recipe.pretrained = False
    if recipe.source_name and data.vocab_size is not None:
        raise ValueError("data.vocab_size must be null: the source brings its own tokenizer")
    if recipe.source_name:
        recipe.source = Source(recipe.source_name, weights=False, trusted=recipe.trusted)
    elif data.vocab_size is None:
        raise ValueError("the model has no source to bring a tokenizer, so data.vocab_size must be set")
    else:
        recipe.tokenizer = Vocabulary(data.vocab_size)
    return Prepared(found.name, machine, recipe, data, trainer)


class Vocabulary(dict):
    """As much of a tokenizer that is not trained yet as the size of a model depends on."""

    eos_token_id = 0

    def __init__(self, size: int) -> None:
        super().__init__((str(token), token) for token in range(size))

    def get_vocab(self) -> Vocabulary:
        """Each token's id."""
        return self


def asked(config: dict[str, Any], overrides: Sequence[str]) -> Machine:
    """The machine that a recipe and its overrides ask for, which need not be this one."""
    trainer: dict[str, Any] = {
        "accelerator": "auto",
        "devices": "auto",
        "num_nodes": 1,
        "strategy": "auto",
        "precision": "32-true",
    }
    trainer |= {key: value for key, value in config.get("trainer", {}).items() if key in trainer}
    for word in overrides:
        key, _, value = word.lstrip("-").partition("=")
        if key.removeprefix("trainer.") in trainer and key.startswith("trainer."):
            trainer[key.removeprefix("trainer.")] = yaml.safe_load(value)
    found = torch.cuda.device_count()
    gpus = trainer["accelerator"] in ("gpu", "cuda") or (trainer["accelerator"] == "auto" and found > 0)
    devices = trainer["devices"]
    if devices in ("auto", -1, "-1", None):
        devices = max(1, found) if gpus else 1
    elif isinstance(devices, list):
        devices = len(devices)
    elif isinstance(devices, str) and devices.replace(",", "").isdigit():  # Lightning's "0,3"
        devices = len(devices.split(","))
    if not isinstance(devices, int) or devices < 1:
        raise ValueError(f"trainer.devices must be a number of devices, a list of them or auto, not {devices}")
    devices *= int(trainer["num_nodes"])
    strategy = str(trainer["strategy"])
    if strategy == "auto":
        strategy = "ddp" if devices > 1 else "single"
    if gpus:
        memory = torch.cuda.get_device_properties(0).total_memory if found else None
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(gpus, devices, strategy, full_name(trainer["precision"]), memory)


def rows(count: int, length: int) -> Batch:
    """Full rows of one document each, with their noise."""
    noise = [uniforms(0, 0, place, 0, 0, length) for place in range(count)]
    position_BL = torch.arange(length).repeat(count, 1)
    u_BL, t_BL = (torch.stack(column) for column in zip(*noise, strict=True))
    zero_BL = torch.zeros_like(position_BL)
    return Batch(zero_BL, position_BL, zero_BL, position_BL > 0, u_BL, t_BL, torch.arange(count))


def scored_per_row(recipe: Recipe, length: int) -> float:
    """How many terms of the loss a full row has on average, by the recipe's own masks."""
    batch = rows(DRAWS, length)
    _, _, scored = recipe.shown(batch, recipe.pattern)
    return len(scored.index_N) / DRAWS


# The tables


def tables(plan: Plan) -> Group:
    """A plan in human units."""
    machine = plan.machine
    on = f"{machine.devices} × {'GPU' if machine.gpus else 'CPU'}, {machine.strategy}, {machine.precision}"
    return Group(
        Text(f"{plan.name} on {on}", style="bold"), _parameters(plan), _memory(plan), _work(plan), _verdict(plan)
    )


def _parameters(plan: Plan) -> Table:
    table = _table("parameters", "number", "trained")
    counts: dict[str, list[int]] = {}
    for name, parameter in plan.denoiser.network.named_parameters():
        count = counts.setdefault(place(name)[1], [0, 0])
        count[0] += parameter.numel()
        count[1] += parameter.numel() if parameter.requires_grad else 0
    for group, (number, trained) in counts.items():
        table.add_row(group, _scaled(number), _scaled(trained))
    table.add_section()
    table.add_row("all", *(_scaled(sum(column)) for column in zip(*counts.values(), strict=True)))
    return table


def _memory(plan: Plan) -> Table:
    table = _table("memory of a device", "whole", "at the peak")
    for name, sizes in plan.memory.parts.items():
        table.add_row(name, *(_bytes(size) for size in sizes))
    table.add_section()
    table.add_row(f"peak, {plan.memory.when}", "", _bytes(plan.memory.peak))
    return table


def _work(plan: Plan) -> Table:
    table = _table("tokens and FLOPs", "micro-batch, a device", "optimizer step", "run")
    per_step = plan.machine.devices * plan.accumulate
    done = plan.rehearsal
    lines = {
        "data tokens, of the corpus": plan.tokens.data,
        "scored tokens, expected": plan.tokens.scored,
        "forward tokens, computed": plan.tokens.forward,
        "FLOPs needed": needed(done.forward, plan.denoiser),
        "FLOPs with recomputation": done.computed,
    }
    for name, amount in lines.items():
        times = (amount, amount * per_step, amount * per_step * plan.steps)
        unit = "FLOP" if name.startswith("FLOP") else ""
        table.add_row(name, *(_scaled(number, unit) for number in times))
    return table


def _verdict(plan: Plan) -> Text:
    machine, peak = plan.machine, plan.memory.peak
    if machine.memory is None:
        return Text(f"peak {_bytes(peak)} on each device; there is no GPU here to compare it with")
    shared = "" if machine.gpus or machine.devices == 1 else f" for {machine.devices} processes"
    peak *= 1 if machine.gpus else machine.devices
    fits = "fits into" if peak < machine.memory else "does not fit into"
    return Text(f"peak {_bytes(peak)}{shared}: {fits} the {_bytes(machine.memory)} of this machine's memory")


def _table(title: str, *columns: str) -> Table:
    table = Table(title, box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _bytes(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 / 10 else f"{number / 2**20:.1f} MiB"


def _scaled(number: float, unit: str = "") -> str:
    for prefix, factor in {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}.items():
        if number >= factor:
            return f"{number / factor:.3g} {prefix if unit or prefix != 'G' else 'B'}{unit}"
    return f"{number:.3g} {unit}".rstrip()
