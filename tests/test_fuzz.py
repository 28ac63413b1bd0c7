"""Whatever is typed or written into a recipe, it runs or is refused in one sentence; `make fuzz` draws many more cases.

Keys and their types are those of the classes themselves. What is drawn for them is of the type, or an edge, or junk.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from hypothesis import event, given, note, settings
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_post_hook

from dlm_lightning import catalog, checkpoint, runs
from dlm_lightning.errors import parameters
from dlm_lightning.parsing import WITHOUT_DEVICES

CASES = os.environ.get("DLM_FUZZ_CASES")
fuzzed = settings(max_examples=int(CASES or 40), derandomize=CASES is None)
RECIPES = {
    recipe.path: catalog.compose(recipe.path) for recipe in catalog.recipes() if recipe.origin == "dlm_lightning"
}
DATA = [path for path, _ in catalog.classes(*catalog.PLUGINS["data modules"])]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TINY = {
    "model_type": "qwen3", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip

# What a case is limited to, so that it is a matter of seconds

PATIENCE = 120  # seconds of computing
MEMORY = 8 * 2**30
HUGE = ("100000000000000000000", "2147483648", "1.0e+300")
WORK = {"max_steps", "batch_size", "num_workers", "samples", "new_tokens", "accumulate_grad_batches", "devices"}
TOO_LONG = {"BatchSizeFinder", "LearningRateFinder"}  # make trials of their own, the first until memory runs out

# Values


def of_type(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation, in the terms of YAML; none of a class that only a class path stands for."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return st.sampled_from([0, "a", [1], {"a": None}])
    if isinstance(kind, type) and kind in SCALARS:
        return st.sampled_from(SCALARS[kind])
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(of_type, args))
    if origin is tuple and args[-1:] != (...,):
        return st.tuples(*map(of_type, args)).map(list)
    if origin is dict:
        return st.dictionaries(st.sampled_from(["a", "rope_theta"]), of_type(args[1]), max_size=2)
    if origin and args:
        items = of_type(args[0])
        return st.nothing() if items.is_empty else st.lists(items, max_size=3)
    if is_dataclass(kind):
        return st.fixed_dictionaries({}, optional={name: of_type(hint) for name, hint in get_type_hints(kind).items()})
    return st.nothing()


SCALARS: dict[Any, list[Any]] = {
    bool: [False, True],
    int: [0, 1, 2, 3, 4, 8],
    float: [0.0, 1.0e-3, 0.1, 0.5, 1.0, 2.0],
    str: ["a", "auto", "cpu", "text", "norm"],
    types.NoneType: [None],
}
EDGES = (
    *("0", "-1", "1", "2.5", "-0.0", ".nan", ".inf", "-.inf", "nan", "1e-400", "0x10", "1_000", *HUGE),
    *("", " ", "null", "~", "true", "no", "many", "ünï çödé 模型 🎲", "x" * 3000, "\\n", "%s {} {0}"),
    *("[]", "{}", "[null]", "[1, [2, [3, {a: [4]}]]]", "{a: {b: {c: [1]}}}", "a: b", "- a", "[a, b]", "{1: 2}"),
    *("${model.lr}", "${nowhere}", "${trainer.max_steps}", "${", "${}", "${oc.env:HOME}", "${a:${b}}", "${model}"),
    *("[1, 2", "{a: ", "'", '"', "*x", "&a b", "!!python/object/apply:os.getcwd []", "@", "%", "`", "|", ">", "?"),
    *("/nowhere", "../..", "/dev/null", ".", "~/nowhere", "2001-01-01", "12:30:45", "null:", "="),
    *("{class_path: nowhere.Nothing}", "{init_args: {a: 1}}", "class_path", "os.system", "torch.nn.Linear"),
)
CLASSES = [
    *("nowhere.Nothing", "torch.nn.Linear", "Checkpoints", "TextFiles", "os", "os.getcwd", "", "a.b.", ".", "..", "3"),
    *("dlm_lightning.checkpoint.Checkpoint", "dlm_lightning.module.Recipe", "lightning.pytorch.callbacks.Callback"),
    *(path for package, base in catalog.PLUGINS.values() for path, _ in catalog.classes(package, base)),
    *(path for path, _ in catalog.classes("dlm_lightning.recipes", "Recipe")),
    *("dlm_lightning.checkpoint.Checkpoints", "dlm_lightning.loggers.MetricsCSV"),
    *(
        f"{module}.{name}"
        for module in ("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "lightning.pytorch.profilers")
        for name in import_module(module).__all__
        if name not in TOO_LONG
    ),
]


def flow(value: Any) -> str:
    """A value as YAML in one line."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("\n...\n").strip()
    )


@cache
def keys(path: str) -> dict[str, Any]:
    """Key → annotation of a class by its full path, the fields of its dataclasses one by one too."""
    try:
        taken = parameters(path)
    except Exception:  # of whatever a path leads to
        return {}
    found: dict[str, Any] = {}
    for name, parameter in taken.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        found[name] = parameter.annotation
        for part in (parameter.annotation, *get_args(parameter.annotation)):
            if is_dataclass(part):
                found |= {f"{name}.{field}": hint for field, hint in get_type_hints(part).items()}
    return found


@st.composite
def a_class(draw: st.DrawFn) -> dict[str, Any]:
    """A class of some sort with some of its arguments."""
    path = draw(st.sampled_from(CLASSES))
    taken = {name: kind for name, kind in keys(path).items() if "." not in name and name not in WORK}
    args = {}
    for name in draw(st.lists(st.sampled_from([*taken, "zzz"]), max_size=2, unique=True)):
        args[name] = draw(of_type(taken.get(name, int)) | st.sampled_from(EDGES))
    return {"class_path": path, **({"init_args": args} if args else {})}


MANNERS = (
    *["of its type"] * 12, *["edge"] * 5, *["classes"] * 4,
    *("appended", "misspelt", "nested", "misplaced", "plus"),
)  # fmt: skip


@st.composite
def override(draw: st.DrawFn, sections: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """A key, right or wrong, and the text of a value."""
    section = draw(st.sampled_from([*sections]))
    key, kind = draw(st.sampled_from([*sections[section].items()]))
    manner, fitting = draw(st.sampled_from(MANNERS)), of_type(kind)
    if manner == "appended":
        return draw(st.sampled_from(["trainer.callbacks+", "trainer.logger+"])), draw(st.sampled_from(CLASSES))
    if manner == "classes" or (manner == "of its type" and fitting.is_empty):
        place = draw(st.sampled_from(["trainer.callbacks", "trainer.logger"]))
        return place, flow(draw(st.lists(a_class(), max_size=2) | a_class()))
    text = draw(fitting.map(flow) if manner == "of its type" else st.sampled_from(EDGES))
    text = affordable(key.rsplit(".", 1)[-1], text)
    if manner == "misspelt":
        place = draw(st.integers(0, len(key) - 1))
        key = key[:place] + draw(st.sampled_from(["", "x", "_", "é", "-"])) + key[place + 1 :] or "x"
    if manner == "misplaced":
        section = draw(st.sampled_from(["model", "data", "trainer", "modle", "zzz", "seed_everything"]))
    key += {"nested": ".zzz", "plus": "+"}.get(manner, "")
    return (key if key == "seed_everything" else f"{section}.{key}"), text


def affordable(name: str, text: str) -> str:
    """The text, unless it asks for long work, for other processes, or for a place that is none of this test's."""
    if name in WORK and (text in HUGE or re.search(r"inf|[2-9]\d|\d\d\d", text)):
        return "-1"
    if name == "devices" and re.search(r"[2-9]|\d\d", text):  # each one is a process
        return "1"
    if name == "cache_dir" and text[:1] in ("/", "~", "."):
        return "a"
    if name == "paths" and text in ("null", "~", "", " "):  # the standard library
        return "[]"
    return text


# Recipes


@dataclass(frozen=True)
class Place:
    """Where a case finds its source, its corpus and its conversations."""

    source: Path
    corpus: Path
    chats: Path


@pytest.fixture(scope="module")
def place(source_folder: Callable[..., Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    chats = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    chats.write_text("".join(json.dumps({"prompt": f"say {n}", "response": f"{n}"}) + "\n" for n in range(40)))
    return Place(source_folder("qwen3", tied=True), corpus, chats)


def tiny(recipe: Path, data: str, place: Place) -> dict[str, Any]:
    """A recipe that extends a shipped one to be a matter of a second, on a data module."""
    model = RECIPES[recipe]["model"]
    short = {"class_path": "dlm_lightning.data.exact_answers.ExactAnswers", "init_args": {"samples": 20}}
    own = {
        "TextFiles": {"paths": [str(place.corpus)], "val_share": 0.2},
        "ExactAnswers": short["init_args"],
        "Chat": {"paths": [str(place.chats)], "chat_template": TEMPLATE},
        "HubText": {"path": "text", "data_files": str(place.corpus / "0.txt"), "documents": 40},
        "Mixture": {"parts": [short, {**short, "init_args": {"samples": 30}}]},
    }.get(data.rsplit(".", 1)[-1], {})
    sizes = {"row_length": 24, "batch_size": 2, "val_rows": 2, "num_workers": 0}
    if model["init_args"].get("config") and not data.endswith("Chat"):
        args, sizes = {"config": TINY}, {**sizes, "vocab_size": 300}
    else:
        args, sizes = {"source": str(place.source), "config": None}, {**sizes, "vocab_size": None}
    if "block_size" in keys(model["class_path"]):
        args |= {"block_size": 4}
    here = dict(word.removeprefix("--trainer.").split("=") for word in WITHOUT_DEVICES if "logger" not in word)
    steps = {"max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1, "accumulate_grad_batches": 1}
    return {
        "extends": str(recipe),
        "model": {"init_args": args},
        "data": {"class_path": data, "init_args": {**sizes, **own}},
        "trainer": {**here, "devices": 1, "num_nodes": 1, **steps},
    }


@dataclass(frozen=True)
class Case:
    """A recipe, its data module, what is set in it, and whether that is written in a YAML or typed."""

    recipe: Path
    data: str
    overrides: list[tuple[str, str]]
    written: bool
    tail: str

    def lines(self) -> str:
        """The overrides as YAML, which a strange value or two of the same key may make unreadable."""
        tree: dict[str, Any] = {}
        for key, text in self.overrides:
            section, *names = key.split(".")
            names = names if section in ("trainer", "seed_everything") else ["init_args", *names]
            node = tree
            for name in [section, *names[:-1]]:
                node = node.setdefault(name, {}) if isinstance(node.get(name, {}), dict) else {}
            node[names[-1] if names else section] = text
        return "".join(_block({name: node}, 0) for name, node in tree.items()) + self.tail


def _block(tree: dict[str, Any], depth: int) -> str:
    inner = [
        f"{'  ' * depth}{key}:" + (f"\n{_block(node, depth + 1)}" if isinstance(node, dict) else f" {node}\n")
        for key, node in tree.items()
    ]
    return "".join(inner)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A shipped recipe with a handful of overrides."""
    recipe, data = draw(st.sampled_from([*RECIPES])), draw(st.sampled_from(DATA))
    sections = {
        "model": keys(RECIPES[recipe]["model"]["class_path"]),
        "data": keys(data),
        "trainer": {**keys("lightning.pytorch.Trainer"), "seed_everything": int},
    }
    overrides = draw(st.lists(override(sections), min_size=1, max_size=4))
    if draw(st.booleans()):
        overrides = overrides[:1]
    tail = draw(st.sampled_from([""] * 8 + ["x", "\t- a", "extends: b", "? [", "model: 3\n", "zzz: {a: 1}\n"]))
    return Case(recipe, data, overrides, draw(st.booleans()), tail)


# The property


class Hang(BaseException):
    """A case that takes too much computing."""


@contextmanager
def bounded() -> Iterator[set[int]]:
    """Bound computing and memory, and put back what a trainer sets for the process; counts the optimizer's steps."""

    def stop(*_: Any) -> None:
        raise Hang

    steps: set[int] = set()
    before, limits = signal.signal(signal.SIGPROF, stop), resource.getrlimit(resource.RLIMIT_DATA)
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: steps.update(int(state["step"]) for state in optimizer.state.values())
    )
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, limits[1]))
    try:
        yield steps
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        hook.remove()
        torch.use_deterministic_algorithms(False)
        torch.autograd.set_detect_anomaly(False)


def assert_one_sentence(text: str) -> str:
    """The sentence of a refusal."""
    assert text.startswith("dlm: ") and text.endswith("\n") and text.count("\n") == 1, text
    for ugly in ("Traceback", "<class", "object at 0x", "jsonargparse", "_Literal"):
        assert ugly not in text, text
    said = text.removeprefix("dlm: ").strip()
    assert len(said.split()) > 2 and not re.match(r"[A-Z]\w+(Error|Exception)\b", said), text
    return said


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def check(case: Case, typed: Callable[..., Any], place: Place, cwd: Path) -> None:
    """Run a case and hold what it leaves against the rules."""
    (cwd / "base.yaml").write_text(yaml.safe_dump(tiny(case.recipe, case.data, place)))
    (cwd / "mine.yaml").write_text("extends: base.yaml\n" + case.lines())
    words = ["mine.yaml"] if case.written else ["base.yaml", *(f"{key}={text}" for key, text in case.overrides)]
    note(f"dlm fit {' '.join(map(repr, words))}\n{(cwd / 'mine.yaml').read_text() if case.written else ''}")
    before = files(cwd)
    with bounded() as steps:
        said = typed("fit", *words, "--run", "run", cwd=cwd)
    run = cwd / "run"
    outside = files(cwd) - before - files(run) - {run}
    assert not outside or any("cache_dir" in key for key, _ in case.overrides), outside
    if said.code == 0:
        event("ran")
        assert said.out.endswith(f"run: {run.resolve()}\n")
        _, origin = runs.open_run(str(run))
        config = yaml.safe_load((run / runs.CONFIG).read_text())
        assert origin["recipe"] == words[0].removesuffix(".yaml")
        assert len(steps) == (int(config["trainer"]["fast_dev_run"]) or config["trainer"]["max_steps"])
        written = str(config["trainer"]["callbacks"])
        if "dlm_lightning.checkpoint.Checkpoints" in written and not config["trainer"]["fast_dev_run"]:
            newest = checkpoint.newest(run)
            assert newest and checkpoint.read(newest)["global_step"] == len(steps)
        return
    event("stopped" if steps else "refused")
    assert said.code == 1, said
    sentence = assert_one_sentence(said.err)
    assert run.exists() == bool(steps), "a run folder is left behind exactly if there were steps"
    if len(case.overrides) == 1 and not (case.written and (case.tail or "mine.yaml" in sentence)):
        section, _, key = case.overrides[0][0].removesuffix("+").removesuffix(".zzz").partition(".")
        names = key.split(".") if section in ("model", "data", "trainer") else [section]
        names += [name for path in re.findall(r"[\w.]+", case.overrides[0][1]) for name in path.split(".")[-1:]]
        if case.overrides[0][0].endswith("+"):
            names.append(section)
        assert any(name in sentence for name in names) or "keys are names" in sentence, sentence


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_runs_where_nothing_is_set(recipe, typed, place, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny(recipe, "dlm_lightning.data.text_files.TextFiles", place)))
    assert typed("fit", "base.yaml", cwd=tmp_path).code == 0


@fuzzed
@given(case=cases())
def test_a_recipe_runs_or_is_refused_in_one_sentence(case, typed, place):
    with TemporaryDirectory() as cwd:
        check(case, typed, place, Path(cwd))


# Command lines

COMMANDS = ("fit", "resume", "validate", "summary", "probe", "show", "plan", "list", "fti", "", "--zzz")
WORDS = (
    *("block_causal", "blok_causal", "nowhere", "nowhere.yaml", "broken.yaml", "empty.yaml", ".", "/", "", " ", "🎲"),
    *("--run", "--run=", "--ckpt_path", "--ckpt_path=nowhere", "--config", "--config=nowhere.yaml", "--out", "--", "-"),
    *(
        "--zzz",
        "-x",
        "-h",
        "--help",
        "--version",
        "--print_config",
        "--model.help",
        "--trainer.zzz",
        "--trainer.logger",
    ),
    *("=", "=3", "a=", "model", "model.lr=x", "data.paths=[nowhere]", "trainer=", "--model.lr=x", "model.block_size=0"),
)


@fuzzed
@given(command=st.sampled_from(COMMANDS), words=st.lists(st.sampled_from(WORDS), max_size=4))
def test_a_command_line_does_its_work_or_is_refused_in_one_sentence(command, words, typed):
    """None of these has what it takes to train: the source of `block_causal` is not there."""
    with TemporaryDirectory() as folder:
        cwd = Path(folder)
        (cwd / "broken.yaml").write_text("model: [")
        (cwd / "empty.yaml").touch()
        before = files(cwd)
        with bounded():
            said = typed(command, *words, cwd=cwd)
        assert said.code in (0, 1, 2)
        assert "Traceback" not in said.out + said.err
        if said.code == 1:
            assert_one_sentence(said.err)
        if said.code == 2:
            assert said.err.startswith("usage: dlm ") and re.fullmatch("dlm.*: error: .+", said.err.splitlines()[-1])
        left = {path for path in files(cwd) - before if path.is_file() or path.name.isdigit()}
        assert all(path.suffix == ".png" and said.code == 0 for path in left), left
