"""What commands have in common: their parsers, and what several of them take."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from inspect import getdoc
from typing import Any

from dlm_lightning import catalog

PRECISIONS = ("32-true", "bf16-true")  # in which weights are decoded with


def parser_of(name: str, command: Callable[..., None], usage: str = "", **options: Any) -> argparse.ArgumentParser:
    """A parser whose description is the command's docstring; `usage` is what follows its name."""
    text = " ".join((getdoc(command) or "").split())
    return argparse.ArgumentParser(
        prog=f"dlm {name}", usage=f"dlm {name} {usage}" if usage else None, description=text, **options
    )


def about(command: Callable[..., None]) -> str:
    """The first line of a command's docstring, for the list of all commands."""
    return (getdoc(command) or "").partition("\n")[0].rstrip(".")


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN, a run folder."""
    parser.add_argument("run", metavar="RUN", help="a run folder")


def add_overrides(parser: argparse.ArgumentParser, text: str | None = None) -> None:
    """Any number of key=value; `text` is their help."""
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], type=_override, help=text)


def _override(word: str) -> str:
    if "=" not in word:
        raise argparse.ArgumentTypeError(f"{word} has no =")
    return word


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """RECIPE and its overrides."""
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's name or a YAML file")
    add_overrides(parser)


def add_recipes(parser: argparse.ArgumentParser) -> None:
    """Recipes and overrides in any order; see `recipes`."""
    parser.add_argument(
        "words", metavar="RECIPE | key=value", nargs="+", help="recipes by name or YAML; overrides for all"
    )


def recipes(parser: argparse.ArgumentParser, words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Recipes and overrides, apart; a wrong name is refused before seconds of imports."""
    names, overrides = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    if not names:
        parser.error("which recipes? `dlm list` shows all")
    for name in names:
        catalog.find(name)
    return names, overrides


def split(words: Iterable[str]) -> list[str]:
    """What is named, one by one or behind commas."""
    return [name.strip() for word in words for name in word.split(",") if name.strip()]
