"""Errors as one sentence: a parser's nested report is reduced to the key, the reason and the nearest valid name."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from traceback import walk_tb
from types import NoneType
from typing import Any, get_args, get_type_hints

from dlm_lightning.catalog import PLUGINS, classes, nearest

SECTIONS = ("model", "data", "trainer", "seed_everything")
_TAIL = re.compile(
    r" - Expected a <class '(?:NoneType|collections.abc.Iterable)'>.*| Given value type: .*| - Not a valid sub.*"
    r"| Subclass types .*| - Parser key .*"
)
_NULLABLE = re.compile(r"Expected an? (?:<class 'int'>|\S*Literal).* - Expected a <class 'NoneType'>")
_GIVEN = re.compile(r"Given value:(.*?)(?: - Expected .*)?$")
_IN_YAML = re.compile(r"Group '([^']+)' does not accept option '([^']+)'")
_AS_OVERRIDE = re.compile(r"unrecognized arguments: --(\w+)\.([^=\s]+)")
_INTERPOLATION = re.compile(r"\w+ raised while resolving interpolation: (.*) full_key: (\S+)")  # OmegaConf's
_TYPE = re.compile(r"<class '([^']+)'>|typing\.")
_OBJECT = re.compile(r"<(?:[\w.]+\.)?(\w+)(?: object)? at 0x[0-9a-f]+>")


def sentence(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = _OBJECT.sub(r"\1", " ".join(str(error).split())) or type(error).__name__
    if (callback := _callback(error)) and callback not in text:
        return f"callback {callback}: {text}"
    if match := _INTERPOLATION.match(text):
        return f"{match[2].replace('.init_args', '')}: {match[1]}"
    if text == "unrecognized arguments:":
        return "an argument is empty; write key=value"
    if match := re.match(r"unrecognized arguments: (\S+)", text):
        return _unknown(match[1].lstrip("-").split("=")[0])
    if match := re.match(r"Option '([^']+)' is not accepted|Group '(trainer)' does not accept option '([^']+)'", text):
        return _unknown(match[1] or f"{match[2]}.{match[3]}")
    if match := re.match(r"the following arguments are required: (.*)", text):
        return f"the recipe lacks {match[1]}"
    if match := re.search(r"Key must be a string, got: (\S+)\.", text):
        return f"a key in the recipe is {match[1]}, and keys are names"
    if "Errors: - " not in text and not text.startswith("Parser key "):
        return text
    key = _key(text)
    full = text.rsplit("Errors: - ", 1)[-1]
    reason = _TAIL.sub("", re.sub(r'^Parser key "[^"]+": (?=Problem with given class_path)', "", full))
    if _NULLABLE.match(full) and (given := _GIVEN.search(full)):
        value = given[1].strip() or "nothing"
        reason = f"{reason}. Got value: {value}"  # of a key that may be null, which says it elsewhere
    if match := re.match(r"Problem with given class_path '([^']+)': (.*)", reason):
        path, reason = match.groups()
        key = key or _last(path)  # of a class that fails once it is made
        if match := re.match(r"Option '([^']+)' is not accepted", reason):
            return f"{key}.{match[1]}: {_last(path)} takes no such key{nearest(match[1], parameters(path))}"
        if match := _IN_YAML.match(reason) or _AS_OVERRIDE.match(reason):
            group, name = match.groups()
            return f"{key}.{group}.{name}: there is no such key{nearest(name, _fields(path, group))}"
        if match := re.match(r"module '([^']+)' has no attribute '([^']+)'", reason):
            return f"{key}.class_path: there is no {match[2]} in {match[1]}{nearest(match[2], _names(match[1]))}"
    if match := re.match(r"Expected a dot import path string: (\S+)", reason):
        plugins = [("dlm_lightning.recipes", ("Recipe",)), *PLUGINS.values()]
        known = [path for package, bases in plugins for path, _ in classes(package, bases)]
        meant = nearest(match[1], [_last(path) for path in known])
        full = next((path for path in known if meant.endswith(f" {_last(path)}?")), "")
        return f"{key}.class_path: {match[1]} is not a full class path" + (f"; did you mean {full}?" if full else "")
    if match := re.match(r'Parser key "([^"]+)": (.*)', reason):
        inner, reason = match.groups()
        key = inner if inner.startswith(f"{key}.") or inner == key else ".".join(filter(None, (key, inner)))
    return _readable(key, reason)


def _callback(error: BaseException) -> str:
    """The class of somebody else's callback that an error came through, or nothing."""
    for frame, _ in walk_tb(error.__traceback__):
        own = type(frame.f_locals.get("self"))
        if not own.__module__.startswith("dlm_lightning") and "Callback" in {base.__name__ for base in own.__mro__}:
            return own.__name__
    return ""


def check_overrides(words: Sequence[str], config: Any) -> None:
    """Refuse an override of a nested key that the parser dropped without a word (it checks these in YAML only)."""
    for word in words:
        section, *path = word.lstrip("-").partition("=")[0].split(".")
        if section not in ("model", "data") or len(path) < 2 or path[-1].endswith("+"):
            continue
        known = vars(config[section])
        for name in path if path[0] in ("class_path", "init_args") else ["init_args", *path]:
            if known and name not in known:
                raise ValueError(f"there is no key {section}.{'.'.join(path)}{nearest(name, known)}")
            known = getattr(known.get(name), "__dict__", {})  # none of a plain dict, which takes any key


def check_nulls(config: Any) -> None:
    """Refuse a null of a key that takes none, which the parser lets pass if it stands in YAML."""
    for section in ("model", "data", "trainer"):
        own = config[section]
        if section != "trainer" and "class_path" not in own:
            raise ValueError(f"the recipe lacks {section}.class_path")
        path, given = ("lightning.pytorch.Trainer", own) if section == "trainer" else (own.class_path, own.init_args)
        try:
            taken = parameters(path)
        except (NameError, AttributeError):  # annotations for a type checker alone, or a function in a class's place
            continue
        for name, parameter in taken.items():
            if name in given:
                _check_null(f"{section}.{name}", parameter.annotation, given[name])


def check_plan_nulls(config: Any) -> None:
    """As `check_nulls`, of a decoder's plan, whose parts are named by class or are themselves keys and values."""
    for name, parameter in parameters("dlm_lightning.decode.plan.Plan").items():
        value = config.get(name, "")
        _check_null(name, parameter.annotation, value)
        if path := getattr(value, "class_path", None):
            for key, own in parameters(path).items():
                _check_null(f"{name}.{key}", own.annotation, value.init_args.get(key, ""))


def _check_null(key: str, kind: Any, value: Any) -> None:
    kinds = list(_kinds(kind))
    if value is None and not any(kind in (Any, None, NoneType, object, inspect.Parameter.empty) for kind in kinds):
        raise ValueError(f"{key} must not be null; leave it out for its default")
    for fields in (get_type_hints(kind) for kind in kinds if is_dataclass(kind) and hasattr(value, "items")):
        for name, hint in fields.items():
            _check_null(f"{key}.{name}", hint, value.get(name, ""))


def _kinds(kind: Any) -> Iterator[Any]:
    """An annotation and all that it is made of."""
    yield kind
    for part in get_args(kind):
        yield from _kinds(part)


def _key(text: str) -> str:
    key = ""
    for part in re.findall(r'Parser key "([^"]+)":', text.rsplit("Errors: - ", 1)[0]):  # one per level
        key = f"{key}.{part}" if key and part != key and not part.startswith(f"{key}.") else part
    return key


def _readable(key: str, reason: str) -> str:
    reason = _TYPE.sub(lambda match: match[1] or "", reason)
    reason = re.sub(r"Expected an? (.+?)\.? Got value: (.*)", r"expected \1, got \2", reason)
    reason = re.sub(r"NestedArg\(key='(.+?)', .*\)", r"a key \1", reason)
    reason = re.sub(r"Unable to load config (.*)", r"expected keys and values, got \1", reason)
    reason = re.sub(r"'\w+' object has no attribute 'keys'", "init_args takes keys and values", reason)
    reason = re.sub(
        r"unsupported operand type\(s\) for \+: '(\w+)' and 'str'", r"a key is a \1, and keys are names", reason
    )
    reason = re.sub(r"the following arguments are required: (.*)", r"it lacks \1", reason)
    reason = re.sub(r"^Expected an? ", "expected ", reason).replace(" - Expected a ", " or ")
    reason = re.sub(r"^expected list$", "expected a list, written [one, two]", reason)
    return f"{key}: {reason}" if key and not reason.startswith(key) else reason


def _unknown(key: str) -> str:
    from lightning.pytorch import Trainer

    if key in ("run", "ckpt_path"):
        return f"{key} is an option of dlm fit: --{key} PATH"
    section, _, rest = key.partition(".")
    if section == "trainer" and rest:
        meant = nearest(rest, inspect.signature(Trainer).parameters)
        return f"there is no key {key}{meant.replace('mean ', 'mean trainer.')}"
    if section in SECTIONS or not rest:
        return f"there is no key {key}{nearest(key, SECTIONS)}"
    meant = nearest(section, SECTIONS)
    return f"there is no key {key}{meant.removesuffix('?')}.{rest}?" if meant else f"there is no key {key}"


def parameters(path: str) -> dict[str, inspect.Parameter]:
    """What a class can be given, its bases included, by the class's full path."""
    cls = getattr(importlib.import_module(path.rsplit(".", 1)[0]), _last(path))
    signatures = [inspect.signature(parent.__init__, eval_str=True).parameters for parent in reversed(cls.__mro__)]
    return {name: parameter for signature in signatures for name, parameter in signature.items() if name != "self"}


def _fields(path: str, group: str) -> list[str]:
    parameter = parameters(path).get(group)
    return list(getattr(parameter.annotation, "__dataclass_fields__", [])) if parameter else []


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _names(module: str) -> list[str]:
    return [name for name in vars(importlib.import_module(module)) if not name.startswith("_")]
