"""What can be run: recipes by name or path, their YAML with its fragments, the classes that plug in. No torch here."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from warnings import warn

ENTRY_POINTS = "dlm_lightning.recipes"
PLUGINS = {  # where they lie, and the names of what they extend
    "data modules": ("dlm_lightning.data", ("TokenData", "Answers")),
    "callbacks": ("dlm_lightning.callbacks", ("Callback", "Checkpoint")),
}


@dataclass(frozen=True)
class RecipeFile:
    """A recipe's YAML, its name, where it comes from, and the module to import first (an entry point's), if any."""

    name: str
    path: Path
    origin: str
    module: str | None = None


def recipes() -> list[RecipeFile]:
    """The shipped recipes and those of installed packages, by name."""
    found = {p.stem: RecipeFile(p.stem, p, "dlm_lightning") for p in folder("recipes").glob("*.yaml")}
    for entry in entry_points(group=ENTRY_POINTS):
        path, why = None, "has no YAML beside its module"
        try:
            spec = importlib.util.find_spec(entry.value)
            path = Path(spec.origin).with_suffix(".yaml") if spec and spec.origin else None
        except ImportError:
            pass
        except Exception as error:  # of the package around it, which is imported to find it
            why = f"fails to import: {error}"
        origin = entry.dist.name if entry.dist else entry.value
        if entry.name in found:
            path, why = None, f"has the name of a recipe of {found[entry.name].origin}"
        if path is None or not path.is_file():
            warn(f"plug-in {entry.name} ({entry.value}) {why} and is left out", stacklevel=2)
            continue
        found[entry.name] = RecipeFile(entry.name, path, origin, entry.value)
    return sorted(found.values(), key=lambda recipe: recipe.name)


def folder(name: str) -> Path:
    """The installed folder of `recipes`, `callbacks` or `configs`."""
    return Path(next(iter(importlib.import_module(f"dlm_lightning.{name}").__path__)))


def plans() -> dict[str, Path]:
    """The shipped decoders by name."""
    return {path.stem: path for path in sorted((folder("configs") / "decode").glob("*.yaml"))}


def find(recipe: str) -> RecipeFile:
    """The recipe of a name or of a YAML's path; raises FileNotFoundError with the nearest name."""
    path = Path(recipe).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return RecipeFile(path.stem, path.resolve(), str(path.resolve().parent))
        raise FileNotFoundError(f"there is no recipe file {recipe}")
    known = {found.name: found for found in recipes()}
    if recipe in known:
        return known[recipe]
    raise FileNotFoundError(f"there is no recipe {recipe}{nearest(recipe, known) or ';'} `dlm list` shows all")


def nearest(name: str, known: Any) -> str:
    """`; did you mean X?`, or nothing if nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def compose(path: Path) -> dict[str, Any]:
    """A recipe's YAML over the fragments that it extends, in order: a deep merge in which lists are replaced.

    Where a class takes the place of another, of what that one was given only those keys stay that the new one takes.
    Fragments are relative to the file that names them and may extend others; interpolations are kept.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    def load(path: Path, within: tuple[Path, ...]) -> dict[str, Any]:
        if path in within:
            raise ValueError(f"{path} extends itself")
        if not path.is_file():
            raise FileNotFoundError(f"{within[-1]} extends {path}, which does not exist")
        try:
            own: Any = OmegaConf.load(path)
            if not OmegaConf.is_dict(own):
                raise ValueError(f"{path} is not a mapping of keys to values")
            extends = own.pop("extends", None)
            parts = list(extends) if OmegaConf.is_list(extends) else [extends] if extends else []
        except (OSError, UnicodeError, YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from error
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{path}: extends names a file or a list of files")
        layers = [load((path.parent / part).resolve(), (*within, path)) for part in parts]
        return reduce(_over, [*layers, OmegaConf.to_container(own, resolve=False)], {})

    return load(path.resolve(), ())


def _over(base: Any, own: Any) -> Any:
    """A value over an inherited one."""
    if not isinstance(base, dict) or not isinstance(own, dict):
        return own
    if base.get("class_path") and own.get("class_path", base["class_path"]) != base["class_path"]:
        base = {**base, "init_args": taken(own["class_path"], base.get("init_args") or {})}
    return base | {key: _over(base[key], value) if key in base else value for key, value in own.items()}


def taken(path: Any, init_args: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that a class takes; all of them if there is no such class, which the parser will say."""
    from jsonargparse import ArgumentParser

    try:
        module, _, name = path.rpartition(".")
        known = ArgumentParser().add_class_arguments(getattr(importlib.import_module(module), name), fail_untyped=False)
    except Exception:  # of whatever is imported
        return init_args
    return {key: value for key, value in init_args.items() if key in known}


def make_importable(recipe: RecipeFile) -> None:
    """Put a recipe's folder on the path, or import its plug-in; a plug-in that fails is named in a warning."""
    if recipe.module is None:
        if recipe.origin != "dlm_lightning" and recipe.origin not in sys.path:
            sys.path.insert(0, recipe.origin)
        return
    try:
        importlib.import_module(recipe.module)
    except Exception as error:
        warn(f"plug-in {recipe.name} ({recipe.module}) fails to import: {error}", stacklevel=2)


def classes(package: str, bases: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(class path, first line of its docstring) of a package's classes that extend one of `bases`, which are not among
    them; imports nothing."""
    spec = importlib.util.find_spec(package)
    assert spec and spec.submodule_search_locations
    for path in sorted(Path(spec.submodule_search_locations[0]).glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ClassDef) or node.name in bases:
                continue
            if any(ast.unparse(parent).split(".")[-1] in bases for parent in node.bases):
                doc = (ast.get_docstring(node) or "").split("\n")[0]
                yield f"{package}.{path.stem}.{node.name}", doc
