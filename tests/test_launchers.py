"""Runs by torchrun, under SLURM and after a signal: the same numbers, one sentence, and an exit that resumes."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment

from dlm_lightning import catalog
from dlm_lightning.parsing import parse

BIN = Path(sys.executable).parent
SCRIPT = catalog.folder("configs") / "slurm" / "train.sbatch"
STOPPER = """
import os, signal, lightning as L
class Stop(L.Callback):
    def on_before_backward(self, trainer, *_):
        if trainer.global_step == 3 and trainer.global_rank == trainer.world_size - 1 and "SPARE" not in os.environ:
            os.kill(os.getpid(), signal.SIGUSR1)
"""
CALLBACKS = "[{class_path: stopper.Stop}, {class_path: dlm_lightning.callbacks.checkpoints.Checkpoints}]"


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(run: Path) -> list[float]:
    return [float(row["train/loss"]) for row in metrics(run) if row["train/loss"]]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "step=6" / "state.ckpt", weights_only=True)["state_dict"]


@pytest.fixture
def words(small: Callable[..., list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides of a run that is stopped by SIGUSR1 in mid-step, after 3 finished steps, and validates after step 4."""
    (tmp_path / "stopper.py").write_text(STOPPER)
    return lambda **more: small(**{"trainer__callbacks": CALLBACKS, **more})


@pytest.fixture
def one(words: Callable[..., list[str]], typed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An undisturbed run of one process."""
    monkeypatch.syspath_prepend(tmp_path)
    assert typed("fit", "block_causal", *words(), "--run", "one", cwd=tmp_path, env={"SPARE": "1"}).code == 0
    return tmp_path / "one"


# torchrun


@pytest.fixture
def torchrun(row_cache: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """`torchrun(ranks, "fit", …)` in `tmp_path`."""

    def run(ranks: int, *command: object, **env: str) -> subprocess.CompletedProcess:
        # after `--`, torchrun takes --run for the program's, not for a prefix of its own --run-path
        launcher = [BIN / "torchrun", "--standalone", f"--nproc_per_node={ranks}", "-m", "--", "dlm_lightning.cli"]
        own = {"XDG_CACHE_HOME": str(row_cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            [*map(str, [*launcher, *command])],
            cwd=tmp_path, env=os.environ | own | env, capture_output=True, text=True, timeout=280,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("case", ["a bad key", pytest.param("a folder that holds a run", marks=pytest.mark.slow)])
def test_a_refusal_ends_all_ranks_with_one_sentence(case, torchrun, small, tmp_path):
    (tmp_path / "run").mkdir()
    more, says = {"model__blok": 3}, "dlm: model.blok: BlockCausal takes no such key\n"
    if case != "a bad key":
        (tmp_path / "run" / "config.yaml").touch()
        more, says = {}, "dlm: --run run already holds another run; resume it with `dlm resume run`\n"
    done = torchrun(2, "fit", "block_causal", *small(trainer__devices=2, **more), "--run", "run")
    assert done.returncode == 1
    assert done.stderr.count("dlm: ") == 1 and says in done.stderr
    assert [path.name for path in (tmp_path / "run").rglob("*")] == (["config.yaml"] if case != "a bad key" else [])


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_ranks_stop_together_and_resume_to_the_losses_of_one(strategy, torchrun, words, one, tmp_path):
    """The signal reaches the second rank only, after step 4; in the course of step 5 the ranks agree."""
    two = words(data__batch_size=2, trainer__devices=2, trainer__strategy=strategy)
    done = torchrun(2, "fit", "block_causal", *two, "--run", "two")
    assert "exitcode  : 75" in done.stderr, "torchrun's own exit code is 1 whatever happened"
    assert done.stderr.count(f"dlm: stopped at step 5; `dlm resume {tmp_path / 'two'}` goes on from step 5") == 1
    assert checkpoints(tmp_path / "two") == ["step=5"]
    done = torchrun(2, "resume", "two", SPARE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run: ") == 1
    assert len(losses(one)) == 6
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_four_ranks_give_the_losses_of_one(strategy, torchrun, words, one, tmp_path):
    four = words(data__batch_size=1, trainer__devices=4, trainer__strategy=strategy)
    done = torchrun(4, "fit", "block_causal", *four, "--run", "four", SPARE="1")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "four") == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("launcher", ["lightning", pytest.param("torchrun", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_rank_that_dies_takes_the_job_down(strategy, launcher, victim, torchrun, dlm, words, row_cache, tmp_path):
    """No rank waits for it in a collective call until a timeout: all processes of the job are gone, and it resumes."""
    (tmp_path / "stopper.py").write_text(
        STOPPER.replace("SIGUSR1", "SIGKILL").replace("trainer.world_size - 1", str(victim))
    )
    keep = CALLBACKS.replace("Checkpoints}", "Checkpoints, init_args: {every_n_steps: 2}}")
    two = words(data__batch_size=2, trainer__devices=2, trainer__strategy=strategy, trainer__callbacks=keep)
    fit = "fit", "block_causal", *two, "--run", "two"
    path = {"PYTHONPATH": str(tmp_path)}
    if launcher == "torchrun":
        assert torchrun(2, *fit).returncode != 0
    else:
        dlm(*fit, cwd=tmp_path, env=path, fails=True)
    assert not [link for link in Path("/proc").glob("[0-9]*/cwd") if works_in(link) == tmp_path]
    assert checkpoints(tmp_path / "two") == ["step=2"]
    if launcher == "lightning":
        dlm("resume", "two", cwd=tmp_path, env=path | {"SPARE": "1"})
        assert checkpoints(tmp_path / "two") == ["step=4", "step=6"]


def works_in(link: Path) -> Path | None:
    """A process's working folder, None if it has ended in the meantime."""
    try:
        return link.readlink()
    except OSError:
        return None


# SLURM


@pytest.fixture
def sbatch(row_cache: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """`sbatch(tasks, RUN, RECIPE, …)`: the shipped script as SLURM would start it, with `srun` and `scontrol` played.

    `srun` returns the highest exit code of its tasks, and both note what they were called with in `called`.
    """
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "srun").write_text(
        '#!/usr/bin/env bash\necho "srun $*" >> called\nwhile [[ $1 == --* ]]; do shift; done\n'
        "for ((task = 0; task < SLURM_NTASKS; task++)); do\n"
        '    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" & tasks+=($!)\n'
        'done\nhighest=0\nfor task in "${tasks[@]}"; do\n'
        '    code=0; wait "$task" || code=$?; ((code > highest)) && highest=$code\ndone\nexit "$highest"\n'
    )
    (commands / "scontrol").write_text('#!/usr/bin/env bash\necho "scontrol $*" >> called\n')
    for command in commands.iterdir():
        command.chmod(0o755)

    def run(tasks: int, *arguments: object, **env: str) -> subprocess.CompletedProcess:
        own = {"PATH": f"{commands}:{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
        own |= {"XDG_CACHE_HOME": str(row_cache), "OMP_NUM_THREADS": "1"}
        slurm = {"JOB_ID": "4217", "JOB_NAME": "dlm", "NTASKS": tasks, "NTASKS_PER_NODE": tasks, "NNODES": 1}
        slurm |= {"NODELIST": "127.0.0.1"}
        job = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
        return subprocess.run(
            ["bash", str(SCRIPT), *map(str, arguments)],
            cwd=tmp_path, env=os.environ | own | job | env, capture_output=True, text=True, timeout=280,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("tasks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_job_that_is_interrupted_requeues_itself_and_ends_as_if_undisturbed(tasks, sbatch, words, one, tmp_path):
    strategy = "ddp" if tasks > 1 else "auto"
    recipe = "block_causal", *words(data__batch_size=4 // tasks, trainer__devices=tasks, trainer__strategy=strategy)
    first = sbatch(tasks, "run folder", *recipe)
    assert first.returncode == 75, first.stderr
    assert checkpoints(tmp_path / "run folder") == [f"step={4 if tasks == 1 else 5}"]  # in which the ranks agree
    assert not list((tmp_path / "run folder").glob("hpc_ckpt*")), "Lightning's own answer to the signal"
    second = sbatch(tasks, "run folder", *recipe, SPARE="1")
    assert second.returncode == 0, second.stderr
    calls = [line.split() for line in (tmp_path / "called").read_text().splitlines()]
    assert [[word for word in call if not word.startswith("--")][:3] for call in calls] == [
        ["srun", "dlm", "fit"],
        ["scontrol", "requeue", "4217"],
        ["srun", "dlm", "resume"],
    ]
    whole = one
    if tasks > 1:
        whole = tmp_path / "whole"
        assert sbatch(tasks, whole, *recipe, SPARE="1").returncode == 0
        assert losses(whole) == pytest.approx(losses(one), rel=1e-5)
    end, expected = weights(tmp_path / "run folder"), weights(whole)
    assert all(torch.equal(end[name], value) for name, value in expected.items())
    assert metrics(tmp_path / "run folder") == metrics(whole)


def test_lightnings_own_requeueing_is_off(monkeypatch, small, tmp_path):
    for name, value in {"NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "dlm"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    cli = parse(catalog.compose(catalog.find("block_causal").path), small(), tmp_path)
    environment = cli.trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue


def test_a_job_that_fails_does_not_requeue_itself(sbatch, tmp_path):
    done = sbatch(1, "run", "blok_causal")
    assert (done.returncode, done.stderr.count("dlm: ")) == (1, 1)
    assert "scontrol" not in (tmp_path / "called").read_text()
    assert sbatch(1, "run").returncode == 2


# Signals in one process


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch, words: Callable, tmp_path: Path, typed: Callable):
    """`interrupted(step, name, **overrides)`: what `dlm fit … --run run` said when the signal came before that step."""

    def run(step: int, name: str, **more: object):
        folder = tmp_path / f"module-{step}-{name}"
        folder.mkdir()
        text = STOPPER.replace("global_step == 3", f"global_step == {step}").replace("SIGUSR1", name)
        (folder / f"stopper{step}.py").write_text(text)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, f"stopper{step}", raising=False)
        callbacks = CALLBACKS.replace("stopper.", f"stopper{step}.")
        overrides = [word for word in words(**more) if "callbacks" not in word] + [f"trainer.callbacks={callbacks}"]
        number = signal.Signals[name]
        before = signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
        try:  # tests that run in the background have SIGINT ignored, and what is ignored stays so
            return typed("fit", "block_causal", *overrides, "--run", "run", cwd=tmp_path)
        finally:
            signal.signal(number, before)

    return run


@pytest.mark.parametrize(("name", "code"), [("SIGUSR1", 75), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_step_of_several_micro_batches_is_finished_and_saved_first(name, code, interrupted, typed, one, tmp_path):
    more = {"data__batch_size": 2, "trainer__accumulate_grad_batches": 2, "trainer__val_check_interval": 8}
    said = interrupted(2, name, **more)
    assert (said.code, said.err) == (
        code,
        f"dlm: stopped at step 3; `dlm resume {tmp_path / 'run'}` goes on from step 3\n",
    )
    assert checkpoints(tmp_path / "run") == ["step=3"]
    assert len(losses(tmp_path / "run")) == 3
    assert typed("resume", "run", cwd=tmp_path, env={"SPARE": "1"}).code == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.parametrize("step", [3, 5])
def test_a_validation_that_is_due_is_made_once(step, interrupted, typed, one, tmp_path):
    """After step 4 it is due by `val_check_interval`, after step 6 because it is the last."""
    said = interrupted(step, "SIGTERM")
    assert said.code == (143 if step == 3 else 0)
    assert checkpoints(tmp_path / "run") == [f"step={step + 1}"]
    if step == 3:
        assert typed("resume", "run", cwd=tmp_path, env={"SPARE": "1"}).code == 0
    assert metrics(tmp_path / "run") == metrics(one)
    assert [row["step"] for row in metrics(one) if row["val/nelbo"]] == ["0", "3", "5"]
