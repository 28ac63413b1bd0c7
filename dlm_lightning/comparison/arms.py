"""The arms of a comparison: recipes that do the same work, and the AR control arm beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningCLI

from dlm_lightning import catalog
from dlm_lightning.parsing import PLACEHOLDER, parse

CONTROL = "control"
SAME = (  # keys that must not differ, or it is not the pattern that is compared
    "model.source",
    "data.paths",
    "data.val_paths",
    "data.tasks",
    "data.parts",
    "data.weights",
    "data.row_length",
    "data.batch_size",
    "data.val_rows",
    "data.seed",
    "trainer.accumulate_grad_batches",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.precision",
)
LIKE = ("model.lr", "model.min_lr_ratio", "model.warmup_steps", "model.weight_decay", "model.betas", "model.lr_scale")


def named(recipes: Sequence[str]) -> dict[str, str]:
    """Recipes by the names of their arms, a YAML by its full path; ValueError for two of one name."""
    arms: dict[str, str] = {}
    for recipe in recipes:
        found = catalog.find(recipe)
        if found.name in arms or found.name == CONTROL:
            raise ValueError(f"two arms would be called {found.name}; rename one of the YAMLs")
        arms[found.name] = recipe if recipe == found.name else str(found.path)
    return arms


def taken(recipe: str, overrides: Sequence[str]) -> list[str]:
    """Those overrides whose key a recipe takes: a block size is nothing to a pattern without blocks."""
    found = catalog.find(recipe)
    catalog.make_importable(found)
    keys = [word.lstrip("-").partition("=")[0].split(".") for word in overrides]
    of_model = {key[1]: None for key in keys if key[0] == "model" and key[1:]}
    known = catalog.taken(catalog.compose(found.path)["model"]["class_path"], of_model)
    foreign = [key[0] == "model" and key[1:] and key[1] not in known for key in keys]
    return [word for word, other in zip(overrides, foreign, strict=True) if not other]


def check_overrides(overrides: Sequence[str], budget: bool) -> None:
    """Refuse overrides of what a comparison decides itself."""
    own = {"seed_everything": "--seeds", "data.seed": "--seeds", **({"trainer.max_steps": "--steps"} if budget else {})}
    for word in overrides:
        key = word.lstrip("-").partition("=")[0]
        if not key or not key.replace(".", "").replace("_", "").isalnum():
            raise ValueError(f"{word} is no override; write key=value")
        if key in own:
            raise ValueError(f"{key} is the comparison's to say: {own[key]}")


def parsed(arms: Mapping[str, str], overrides: Sequence[str]) -> dict[str, LightningCLI]:
    """Each arm's trainer, model and data, with the overrides that it takes; ValueError for one that none takes."""
    of_arm = {arm: taken(recipe, overrides) for arm, recipe in arms.items()}
    for word in overrides:
        if not any(word in own for own in of_arm.values()):
            raise ValueError(f"none of the recipes takes {word.lstrip('-').partition('=')[0]}")
    return {
        arm: parse(catalog.compose(catalog.find(recipe).path), [*of_arm[arm], "--trainer.logger=false"], PLACEHOLDER)
        for arm, recipe in arms.items()
    }


def check_same_work(clis: Mapping[str, LightningCLI]) -> list[str]:
    """Notes on settings of the optimizer that differ among arms; ValueError if source, data or devices do."""
    first, *others = clis
    notes = []
    for other in others:
        for key in ("data.class_path", *SAME, *LIKE):
            a, b = (_value(clis[arm].config, key) for arm in (first, other))
            if a == b:
                continue
            line = f"{key} is {a} in {first} and {b} in {other}"
            if key not in LIKE:
                raise ValueError(f"the arms do not do the same work: {line}")
            notes.append(line)
    return notes


def _value(config: Any, key: str) -> Any:
    section, name = key.split(".")
    values = config[section]
    return values.get(name) if section == "trainer" or name == "class_path" else values.init_args.get(name)


def control(place: Path, first: str) -> Path:
    """Write the control arm's YAML: the first recipe's data, optimizer and trainer, the source's causal pattern."""
    path = place / f"{CONTROL}.yaml"
    own = {
        "extends": [str(catalog.find(first).path)],
        "model": {"class_path": "dlm_lightning.recipes.ar_source.ArSource", "init_args": {"config": None}},
    }
    path.write_text("# The AR control arm: the same extra training, causal.\n" + yaml.safe_dump(own, sort_keys=False))
    return path


def forward_tokens_per_step(cli: Any) -> int:
    """Tokens that pass the network in an optimizer step."""
    data, trainer = cli.datamodule, cli.trainer
    rows = data.batch_size * trainer.accumulate_grad_batches * trainer.num_devices * trainer.num_nodes
    return rows * data.row_length * cli.model.copies
