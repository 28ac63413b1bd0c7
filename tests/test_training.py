"""Whole runs through the command line: artefacts, resume, ranks and strategies, plug-ins."""

from __future__ import annotations

import csv
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

RECIPES = ("full_bidirectional", "block_causal", "complementary_mask")


def metrics(run: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without its columns of time."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [
            {k: v for k, v in row.items() if "seconds" not in k and not k.startswith("speed/")}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if set(row.values()) - {"", row["step"], row["epoch"]}]


def losses(run: Path) -> list[float]:
    return [float(row["train/loss"]) for row in metrics(run) if row["train/loss"]]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"step={step}" / "state.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_shipped_recipe_runs_and_leaves_what_the_readme_says(recipe, dlm, small, tmp_path):
    done = dlm("fit", recipe, *small(), cwd=tmp_path)
    run = tmp_path / "runs" / recipe / "1"
    assert done.stdout.splitlines()[-1] == f"run: {run}"
    assert "step 0: masked cross-entropy" in done.stdout
    for name in ("config.yaml", "metrics.csv", "tensorboard", "checkpoints/step=6", "drift/drift.parquet"):
        assert (run / name).exists(), name
    assert (run / "drift" / "step_000006.png").stat().st_size > 1000
    assert "tokens per forward" in (run / "samples" / "step_000006.txt").read_text()
    validations = [row for row in metrics(run) if row["val/nelbo"]]
    assert next(row["step"] for row in validations) == "0"
    assert all(row["val/ar_nll"] for row in validations)
    assert len(losses(run)) == 6
    assert "tokens per forward" in dlm("summary", run, cwd=tmp_path).stdout
    before = (run / "metrics.csv").read_bytes()
    assert validations[-1]["val/nelbo"][:6] in dlm("validate", run, cwd=tmp_path).stdout
    assert (run / "metrics.csv").read_bytes() == before


def test_a_run_without_validation_says_nothing_of_step_0(dlm, small, tmp_path):
    done = dlm("fit", "block_causal", *small(trainer__limit_val_batches=0), "--run", "run", cwd=tmp_path)
    assert "step 0" not in done.stdout
    assert len(losses(tmp_path / "run")) == 6
    assert "drift" in dlm("summary", "run", cwd=tmp_path).stdout


def test_the_resolved_config_repeats_the_run(dlm, small, tmp_path):
    dlm("fit", "block_causal", *small(), "--run", "a", cwd=tmp_path)
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    text = yaml.safe_dump(config).replace(str(tmp_path / "a"), str(tmp_path / "b"))
    (tmp_path / "again.yaml").write_text(text)
    dlm("fit", "again.yaml", "--run", "b", cwd=tmp_path)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_ar_source_trains_a_folder_that_transformers_loads_and_that_converts(dlm, corpus, tmp_path):
    data = [f"data.paths=[{corpus}]", "data.val_share=0.2", "data.row_length=24", "data.val_rows=6"]
    model = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    model |= {"num_attention_heads": 2, "num_key_value_heads": 1, "model_type": "qwen3", "tie_word_embeddings": True}
    small = ["trainer.max_steps=3", "trainer.val_check_interval=3", f"model.config={model}", "data.vocab_size=300"]
    dlm("fit", "ar_source", *data, *small, cwd=tmp_path)
    folder = tmp_path / "runs" / "ar_source" / "1" / "model"
    network = AutoModelForCausalLM.from_pretrained(folder)
    trained = weights(folder.parent, 3)
    for name, value in network.state_dict().items():
        assert torch.equal(value, trained[f"denoiser.network.{name}"]), name
    assert "where everything lies" in dlm("summary", folder.parent, cwd=tmp_path).stdout
    dlm("fit", "block_causal", *data, *small[:2], cwd=tmp_path)  # finds runs/ar_source by itself
    first = next(row for row in metrics(tmp_path / "runs/block_causal/1") if row["val/ar_nll"])
    last = [row for row in metrics(folder.parent) if row["val/ar_nll"]][-1]
    assert float(first["val/ar_nll"]) == pytest.approx(float(last["val/ar_nll"]), rel=1e-6)


def test_a_source_that_is_killed_after_its_last_checkpoint_has_its_model(dlm, corpus, tmp_path):
    """The kill comes between the last step's checkpoint and the end of training."""
    model = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    model |= {"num_attention_heads": 2, "num_key_value_heads": 1, "model_type": "qwen3", "tie_word_embeddings": True}
    (tmp_path / "killer.py").write_text(stopper("SIGKILL", "on_fit_end").replace("Stop", "Kill"))
    package = "dlm_lightning"
    callbacks = [
        {"class_path": "killer.Kill"},
        {"class_path": f"{package}.callbacks.checkpoints.Checkpoints", "init_args": {"every_n_steps": 2}},
        {"class_path": f"{package}.callbacks.save_pretrained.SavePretrained"},
    ]
    data = [f"data.paths=[{corpus}]", "data.val_share=0.2", "data.row_length=24", "data.val_rows=6"]
    words = [*data, "data.vocab_size=300", "trainer.max_steps=2", f"model.config={model}"]
    words += ["trainer.val_check_interval=2", f"trainer.callbacks={callbacks}", "--run", "run"]
    dlm("fit", "ar_source", *words, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, fails=True)
    assert (tmp_path / "run" / "checkpoints" / "step=2").is_dir()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("accumulate", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_undisturbed_bitwise(recipe, accumulate, dlm, small, tmp_path):
    """The kill is a real one: SIGKILL from inside step 5, after the checkpoint of step 4."""
    checkpoints = (
        "[{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints, init_args: {every_n_steps: 2, keep: 9}}]"
    )
    words = small(
        trainer__callbacks=checkpoints,
        trainer__accumulate_grad_batches=accumulate,
        trainer__val_check_interval=4 * accumulate,
        data__batch_size=2,
    )
    dlm("fit", recipe, *words, "--run", "whole", cwd=tmp_path)
    killer = "[{class_path: killer.Kill}, " + checkpoints[1:]
    (tmp_path / "killer.py").write_text(
        "import os, signal, lightning as L\n"
        "class Kill(L.Callback):\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        "        if trainer.global_step == 5 and 'SPARE' not in os.environ: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    words = [word for word in words if "callbacks" not in word] + [f"trainer.callbacks={killer}"]
    path = {"PYTHONPATH": str(tmp_path)}
    dlm("fit", recipe, *words, "--run", "killed", cwd=tmp_path, env=path, fails=True)
    assert not (tmp_path / "killed" / "checkpoints" / "step=6").exists()
    dlm("resume", "killed", cwd=tmp_path, env=path | {"SPARE": "1"})
    whole, killed = weights(tmp_path / "whole", 6), weights(tmp_path / "killed", 6)
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


def test_a_run_that_died_before_its_first_checkpoint_starts_again(dlm, small, tmp_path):
    dlm("fit", "block_causal", *small(), "--run", "whole", cwd=tmp_path)
    shutil.copytree(tmp_path / "whole", tmp_path / "died")
    shutil.rmtree(tmp_path / "died" / "checkpoints")
    done = dlm("resume", "died", cwd=tmp_path)
    assert "no checkpoint yet; it starts again from step 0" in done.stdout
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "died")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    "recipe", ["complementary_mask", *(pytest.param(r, marks=pytest.mark.slow) for r in RECIPES[:2])]
)
def test_two_ranks_give_the_losses_of_one(recipe, strategy, dlm, small, tmp_path):
    dlm("fit", recipe, *small(), "--run", "one", cwd=tmp_path)
    two = small(data__batch_size=2, trainer__devices=2, trainer__strategy=strategy)
    done = dlm("fit", recipe, *two, "--run", "two", cwd=tmp_path)
    assert done.stdout.count("run: ") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = ([row for row in metrics(tmp_path / run) if row["train/loss"]] for run in ("one", "two"))
    for name in ("train/grad_norm", *(name for name in one[0] if name.startswith("train/masked_ce/"))):
        ours, theirs = ([float(row[name]) for row in rows] for rows in (one, two))
        assert theirs == pytest.approx(ours, rel=1e-4, nan_ok=True), name
        assert not all(math.isnan(value) for value in ours), name
    one, two = ([row for row in metrics(tmp_path / run) if row["val/nelbo"]] for run in ("one", "two"))
    for name in ("val/nelbo", "val/ar_nll", "val/masked_ce"):
        assert [float(row[name]) for row in two] == pytest.approx([float(row[name]) for row in one], rel=1e-5)
    drifts = [float(row["drift/q/rel_fro"]) for run in ("one", "two") for row in metrics(tmp_path / run)
              if row.get("drift/q/rel_fro")]  # fmt: skip
    assert len(drifts) == 2
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-3)


def test_fsdp2_resumes_from_its_sharded_checkpoint(dlm, small, tmp_path):
    checkpoints = (
        "[{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints, init_args: {every_n_steps: 2, keep: 9}}]"
    )
    words = small(
        data__batch_size=2, trainer__devices=2, trainer__strategy="fsdp2", trainer__callbacks=checkpoints,
        data__val_rows=2,
    )  # fmt: skip
    dlm("fit", "block_causal", *words, "--run", "whole", cwd=tmp_path)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step=6")
    dlm("resume", "cut", cwd=tmp_path)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    assert "tokens per forward" in dlm("summary", "cut", cwd=tmp_path).stdout


def test_a_run_that_moved_continues_from_anywhere(dlm, small, corpus, tmp_path):
    """With relative paths to its data, and a path so long that YAML folds it."""
    (tmp_path / "texts").symlink_to(corpus)
    here = tmp_path / ("a folder with a long name and spaces " * 3) / "run"
    here.parent.mkdir()
    dlm("fit", "block_causal", *small(data__paths="[texts]"), "--run", here, cwd=tmp_path)
    before = metrics(here)
    there = here.rename(tmp_path / "moved")
    shutil.rmtree(there / "checkpoints")
    (tmp_path / "elsewhere").mkdir()
    dlm("resume", there, cwd=tmp_path / "elsewhere")
    assert metrics(there) == before
    assert not here.exists()
    assert (there / "checkpoints" / "step=6").is_dir()


def test_a_run_without_checkpoints_writes_none(typed, small, tmp_path):
    """Lightning would write one of its own, which no resume could read."""
    words = small(trainer__callbacks="[]", trainer__limit_val_batches=0)
    assert typed("fit", "block_causal", *words, "--run", "run", cwd=tmp_path).code == 0
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    before = metrics(tmp_path / "run")
    said = typed("resume", "run", cwd=tmp_path)
    assert (said.code, "no checkpoint yet; it starts again from step 0" in said.out) == (0, True), said
    assert metrics(tmp_path / "run") == before


SIGNALS = pytest.mark.parametrize(("signal_name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])


def stopper(signal_name: str, hook: str, condition: str = "True") -> str:
    return (
        "import os, signal, lightning as L\n"
        "class Stop(L.Callback):\n"
        f"    def {hook}(self, trainer, *_):\n"
        f"        if {condition}: os.kill(os.getpid(), signal.{signal_name})\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it\n"
    )


@SIGNALS
def test_a_run_that_is_stopped_before_its_first_step_leaves_nothing(signal_name, code, dlm, small, tmp_path):
    (tmp_path / "stopper.py").write_text(stopper(signal_name, "on_validation_batch_start"))
    words = small(trainer__callbacks="[{class_path: stopper.Stop}]")
    path = {"PYTHONPATH": str(tmp_path)}
    done = dlm("fit", "block_causal", *words, "--run", "run", cwd=tmp_path, env=path, fails=True)
    assert done.returncode == code
    assert done.stderr.endswith("dlm: stopped before the first step\n")
    assert not (tmp_path / "run").exists()


def test_a_run_without_checkpoints_or_metrics_is_not_thrown_away(dlm, small, tmp_path):
    (tmp_path / "stopper.py").write_text(stopper("SIGINT", "on_train_batch_start", "trainer.global_step == 5"))
    words = small(trainer__callbacks="[{class_path: stopper.Stop}]", trainer__logger="false")
    path = {"PYTHONPATH": str(tmp_path)}
    dlm("fit", "block_causal", *words, "--run", "run", cwd=tmp_path, env=path, fails=True)
    assert (tmp_path / "run" / "config.yaml").is_file()


@SIGNALS
def test_a_stopped_run_says_how_to_go_on(signal_name, code, dlm, small, tmp_path):
    (tmp_path / "stopper.py").write_text(stopper(signal_name, "on_train_batch_start", "trainer.global_step == 5"))
    checkpoints = "{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints, init_args: {every_n_steps: 2}}"
    words = small(trainer__callbacks=f"[{checkpoints}, {{class_path: stopper.Stop}}]")
    path = {"PYTHONPATH": str(tmp_path)}
    done = dlm("fit", "block_causal", *words, "--run", "run", cwd=tmp_path, env=path, fails=True)
    assert done.returncode == code
    assert f"`dlm resume {tmp_path / 'run'}` goes on from " in done.stderr


def test_accumulation_gives_the_losses_of_one_large_batch(dlm, small, tmp_path):
    dlm("fit", "block_causal", *small(), "--run", "one", cwd=tmp_path)
    several = small(data__batch_size=1, trainer__accumulate_grad_batches=4, trainer__val_check_interval=16)
    dlm("fit", "block_causal", *several, "--run", "several", cwd=tmp_path)
    assert losses(tmp_path / "several") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_bf16_mixed_trains_close_to_float32(dlm, small, tmp_path):
    dlm("fit", "block_causal", *small(), "--run", "full", cwd=tmp_path)
    dlm("fit", "block_causal", *small(trainer__precision="bf16-mixed"), "--run", "half", cwd=tmp_path)
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "full"), rel=0.03)
    assert losses(tmp_path / "half") != losses(tmp_path / "full")


LOGGER = """
from lightning.pytorch.loggers.logger import Logger
class Lines(Logger):
    def __init__(self, path: str): super().__init__(); self.path = path
    name = version = "lines"
    def log_hyperparams(self, *_): pass
    def log_metrics(self, metrics, step=None):
        with open(self.path, "a") as file: print(step, *sorted(metrics), file=file)
"""


def test_another_logger_is_appended_by_one_override_and_survives_a_resume(typed, small, tmp_path, monkeypatch):
    (tmp_path / "lines.py").write_text(LOGGER)
    monkeypatch.syspath_prepend(tmp_path)
    more = ["trainer.logger+=lines.Lines", f"trainer.logger.path={tmp_path / 'lines.txt'}"]
    quick = small(trainer__callbacks="[]", trainer__limit_val_batches=0)
    said = typed("fit", "block_causal", *quick, *more, "--run", "run", cwd=tmp_path)
    assert said.code == 0, said.err

    def logged() -> list[str]:
        steps = [line.split()[0] for line in (tmp_path / "lines.txt").read_text().splitlines() if "train/loss" in line]
        assert steps == [row["step"] for row in metrics(tmp_path / "run") if row["train/loss"]] * (len(steps) // 6)
        assert list((tmp_path / "run" / "tensorboard").iterdir())
        return steps

    assert len(logged()) == 6
    said = typed("resume", "run", cwd=tmp_path)
    assert said.code == 0, said.err
    assert len(logged()) == 12


DOCS = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
STRIDED = re.search(r"```python\n# strided.py\n(.*?)```", DOCS, re.S)[1]  # the documents' own example


def test_a_recipe_in_a_folder_of_its_own_runs_and_resumes(dlm, small, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "strided.py").write_text(STRIDED)
    shipped = Path(__file__).parents[1] / "recipes" / "block_causal.yaml"
    recipe = yaml.safe_load(shipped.read_text())
    recipe["extends"] = [str((shipped.parent / part).resolve()) for part in recipe["extends"]]
    recipe["model"] = {"class_path": "strided.Strided", "init_args": {"stride": 3}}
    (folder / "strided.yaml").write_text(yaml.safe_dump(recipe))
    dlm("fit", "elsewhere/strided.yaml", *small(), "--run", "whole", cwd=tmp_path)
    shutil.copytree(tmp_path / "whole", tmp_path / "died")
    shutil.rmtree(tmp_path / "died" / "checkpoints")
    dlm("resume", "died", cwd=tmp_path / "elsewhere", fails=True)
    dlm("resume", "died", cwd=tmp_path)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "died")
    assert "██" in dlm("show", "elsewhere/strided.yaml", *small()[:1], cwd=tmp_path).stdout


def test_a_recipe_of_an_installed_package_is_listed_and_runs(dlm, small, tmp_path):
    """An installed wheel, as far as Python can tell: a package and its dist-info on the path."""
    site = tmp_path / "site"
    (site / "strided_plugin").mkdir(parents=True)
    (site / "strided_plugin" / "__init__.py").write_text("")
    (site / "strided_plugin" / "strided.py").write_text(STRIDED)
    shipped = Path(__file__).parents[1] / "recipes" / "block_causal.yaml"
    recipe = yaml.safe_load(shipped.read_text())
    recipe["extends"] = [str((shipped.parent / part).resolve()) for part in recipe["extends"]]
    recipe["model"] = {"class_path": "strided_plugin.strided.Strided"}
    (site / "strided_plugin" / "strided.yaml").write_text("# every second token\n" + yaml.safe_dump(recipe))
    info = site / "strided_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strided-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dlm_lightning.recipes]\nstrided = strided_plugin.strided\nbroken = strided_plugin.nowhere\n"
    )
    path = {"PYTHONPATH": str(site)}
    listed = dlm("list", cwd=tmp_path, env=path)
    assert "strided" in listed.stdout and "from strided-plugin" in listed.stdout
    assert "broken" in listed.stderr
    dlm("fit", "strided", *small(), cwd=tmp_path, env=path)
    assert (tmp_path / "runs" / "strided" / "1" / "metrics.csv").is_file()
