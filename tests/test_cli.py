"""The command line: what it says, what it imports, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dlm_lightning import __version__, catalog, cli
from dlm_lightning.callbacks.samples import Samples
from dlm_lightning.callbacks.weight_drift import WeightDrift
from dlm_lightning.commands.runs import _name
from dlm_lightning.data.exact_answers import ExactAnswers
from dlm_lightning.data.text_files import TextFiles

SHIPPED = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
BLOCK_CAUSAL = "dlm_lightning.recipes.block_causal.BlockCausal"


# Without torch


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--help"], "Continue a run from its newest complete checkpoint"),
        (["list"], "dlm_lightning.data.text_files"),
        (["fit", "--help"], "--print_config"),
        (["--version"], __version__),
        (["show", "--help"], "where the picture goes"),
        (["fit", "blok_causal"], ""),
    ],
)
def test_it_answers_without_importing_torch(words, says, tmp_path):
    program = (
        "import sys; from dlm_lightning.cli import main\n"
        f"try: main({words})\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def test_the_installed_command_is_this_one(tmp_path):
    command = Path(sys.executable).with_name("dlm")
    done = subprocess.run([command, "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"dlm {__version__}\n"


def test_list_names_recipes_data_and_callbacks_with_what_they_do(typed, tmp_path):
    said = typed("list", cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    text = " ".join(said.out.split())
    for recipe in RECIPES:
        comment = (SHIPPED / f"{recipe}.yaml").read_text().split("\nextends:")[0]
        sentence = " ".join(comment.replace("#", "").split()).split(". ")[0].rstrip(".")
        assert f"{recipe} {sentence}. from dlm_lightning " in text
    assert "sub_block Fast-dLLM v2's hierarchical cache: a block is filled in parts of 8" in text
    for plugin in (TextFiles, ExactAnswers, WeightDrift, Samples):
        assert f"{plugin.__name__} {plugin.__doc__.splitlines()[0]} from {plugin.__module__}" in text


# Help and configuration


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--model.help"]])
def test_help_on_a_recipe(words, typed, tmp_path):
    said = typed("fit", "block_causal", *words, cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    assert "--model" in said.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([f"--model.help={BLOCK_CAUSAL}"], "tokens per block"),
        (["--model.help", BLOCK_CAUSAL], "tokens per block"),
        (["--data.help", "dlm_lightning.data.text_files.TextFiles"], "kept for validation"),
    ],
)
def test_help_on_a_class(words, says, typed, tmp_path):
    said = typed("fit", "block_causal", *words, cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    assert says in " ".join(said.out.split())  # help is wrapped


def test_help_on_an_unknown_class(refused, tmp_path):
    assert "Nothing" in refused("fit", "block_causal", "--model.help=Nothing", cwd=tmp_path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_printed_config_composes_back_to_itself(recipe, typed, tmp_path):
    said = typed("fit", recipe, "--print_config", cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    (tmp_path / "printed.yaml").write_text(said.out)
    again = typed("fit", "printed.yaml", "--print_config", cwd=tmp_path)
    assert (again.code, again.out) == (0, said.out)
    assert [path.name for path in tmp_path.iterdir()] == ["printed.yaml"]
    printed, recipe_file = yaml.safe_load(said.out), catalog.compose(SHIPPED / f"{recipe}.yaml")
    assert printed["model"]["class_path"] == recipe_file["model"]["class_path"]
    for name, value in recipe_file["model"]["init_args"].items():
        found = printed["model"]["init_args"][name]
        assert (found | value if isinstance(value, dict) else value) == found


def test_the_printed_config_holds_the_overrides(typed, tmp_path):
    words = ["model.block_size=5", "model.noise.half_life=0.3", "trainer.max_steps=7", "--data.seed=3"]
    config = yaml.safe_load(typed("fit", "block_causal", *words, "--print_config", cwd=tmp_path).out)
    arguments = config["model"]["init_args"]
    assert (arguments["block_size"], arguments["noise"]["half_life"]) == (5, 0.3)
    assert arguments["noise"]["masking"] == "tilted"
    assert (config["trainer"]["max_steps"], config["data"]["init_args"]["seed"]) == (7, 3)


# What it refuses


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "COMMAND"),
        (["summary", "done", "a=b"], "unrecognized arguments: a=b"),
        (["plan", "block_causal", "--nonsense", "data.seed=1"], "unrecognized arguments: --nonsense"),
        (["show", "block_causal", "model.block_size"], "argument key=value: model.block_size has no ="),
        (["generate", "done", "--prompt", "a", "help"], "argument key=value: help has no ="),
        (["fitt"], "invalid choice: 'fitt'"),
        (["fit"], "which recipe? `dlm list` shows all"),
        (["fit", "model.block_size=3"], "which recipe? `dlm list` shows all"),
        (["resume"], "the following arguments are required: RUN"),
        (["fit", "block_causal", "--ckpt_path"], "--ckpt_path"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_the_usage(words, says, typed, tmp_path):
    said = typed(*words, cwd=tmp_path)
    assert said.code == 2
    assert said.err.startswith("usage: dlm") and says in said.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["fit", "show"])
@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("blok_causal", "there is no recipe blok_causal; did you mean block_causal? `dlm list` shows all"),
        ("gone.yaml", "there is no recipe file gone.yaml"),
        ("broken.yaml", "broken.yaml is not readable as YAML"),
        ("list.yaml", "list.yaml is not a mapping of keys to values"),
        ("empty.yaml", "the recipe lacks data, model"),
        ("lost.yaml", "nowhere.yaml, which does not exist"),
        ("circle.yaml", "circle.yaml extends itself"),
    ],
)
def test_a_recipe_that_is_none(command, recipe, says, refused, tmp_path):
    for name, text in {"broken": "model: [", "list": "- model", "empty": "", "lost": "extends: [nowhere.yaml]"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "circle.yaml").write_text("extends: [circle.yaml]")
    assert says in refused(command, recipe, cwd=tmp_path)


@pytest.mark.parametrize("command", ["resume", "validate", "summary"])
@pytest.mark.parametrize("folder", ["gone", "empty", "file"])
def test_a_folder_that_is_no_run(command, folder, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    said = refused(command, folder, cwd=tmp_path)
    assert said == f"{folder} is not a run folder (config.yaml or origin.json is missing)"


def test_a_folder_that_holds_another_run_is_not_overwritten(finished, refused, small, tmp_path):
    said = refused("fit", "block_causal", *small(), "--run", "done", cwd=tmp_path)
    assert said == "--run done already holds another run; resume it with `dlm resume done`"


def test_debug_shows_the_traceback(typed, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no recipe nothing"):
        typed("fit", "nothing", cwd=tmp_path, env={"DLM_DEBUG": "1"})
    assert typed("fit", "nothing", cwd=tmp_path, env={"DLM_DEBUG": "0"}).code == 1


def test_the_last_line_is_the_run(typed, small, tmp_path):
    quick = small(trainer__callbacks="[]", trainer__logger="false")
    said = typed("fit", "block_causal", *quick, "--run", "a", cwd=tmp_path)
    assert said.out.splitlines()[-1] == f"run: {tmp_path / 'a'}"


@pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_other_ranks_do_not_name_the_run(rank, monkeypatch, capsys):
    monkeypatch.setenv(rank, "0")
    _name(Path("there"))
    assert capsys.readouterr().out == "run: there\n"
    monkeypatch.setenv(rank, "1")
    _name(Path("there"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("rank", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_what_all_ranks_refuse_is_said_once_a_machine(rank, typed, monkeypatch, tmp_path):
    waited = []
    monkeypatch.setattr(cli.interruption, "outlive", lambda parent, seconds: waited.append(seconds))
    assert typed("fit", "nothing", cwd=tmp_path, env={rank: "0"}).err.startswith("dlm: there is no recipe nothing")
    assert not waited
    said = typed("fit", "nothing", cwd=tmp_path, env={rank: "1"})
    assert (said.code, said.err, waited) == (1, "", [cli.PATIENCE])
    monkeypatch.setattr(cli, "_joined", lambda: True)
    assert typed("fit", "nothing", cwd=tmp_path, env={rank: "1"}).err.startswith("dlm: there is no recipe nothing")


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    """As with `dlm list | head`, whose pipe may be closed before anything is written to it."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "dlm_lightning.cli", "list"],
        cwd=tmp_path,
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
