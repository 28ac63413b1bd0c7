"""Saving a checkpoint: killed at any moment, on a full disk, where nothing can be written, the one before is there."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dlm_lightning import checkpoint, manifest
from dlm_lightning.checkpoint import FACTS, STATE, ElasticIO
from dlm_lightning.saving import write

FSIZE = """
import resource, lightning as L
class Fill(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 4 and trainer.global_rank == trainer.world_size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
"""


def trainer(step: int) -> SimpleNamespace:
    """As much of a trainer as a checkpoint is written from, at a step."""
    content = {"global_step": step, FACTS: {"global batch size": 3, "recipe": "mine", "model.source": None}}
    content["state_dict"] = {"w": torch.full((9000,), float(step))}
    connector = SimpleNamespace(dump_checkpoint=lambda weights_only: dict(content))
    return SimpleNamespace(
        global_step=step, is_global_zero=True, world_size=1, global_rank=0,
        strategy=ElasticIO(), _checkpoint_connector=connector,
    )  # fmt: skip


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_last_complete_ones_are_kept(tmp_path):
    for step in range(1, 8):
        path = write(trainer(step), tmp_path, keep=3)
        assert manifest.verify(path)["consumed_samples"] == 3 * step
        assert names(tmp_path) == [f"step={kept}" for kept in range(max(1, step - 2), step + 1)]
    assert float(checkpoint.read(path)["state_dict"]["w"][0]) == 7


def test_what_is_incomplete_is_not_counted_among_those_that_are_kept(tmp_path):
    for step in (1, 2, 3):
        path = write(trainer(step), tmp_path, keep=3)
    (path / manifest.NAME).unlink()
    write(trainer(4), tmp_path, keep=2)
    assert checkpoint.newest(tmp_path, before=4) == tmp_path / "checkpoints" / "step=2"


def test_a_run_that_went_on_from_an_earlier_one_replaces_the_damaged(tmp_path):
    for step in (2, 4):
        path = write(trainer(step), tmp_path, keep=2)
    (path / STATE).write_bytes(b"")
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints" / "step=2"
    write(trainer(3), tmp_path, keep=2)  # an interruption
    assert names(tmp_path) == ["step=2", "step=3", "step=4"]
    assert write(trainer(4), tmp_path, keep=2) == path
    assert checkpoint.newest(tmp_path) == path and manifest.verify(path)
    assert names(tmp_path) == ["step=3", "step=4"]


class Killed(BaseException):
    """Nothing after it happens, as after a SIGKILL."""


CALLS = {  # what a save calls, in the order in which it does
    "mkdir": (Path, "mkdir"),
    "the state": (torch, "save"),
    "the hashes": (manifest, "describe"),
    "the manifest": (manifest, "write"),
    "the rename": (Path, "rename"),
    "the names": (manifest, "flush"),
    "the removal": (shutil, "rmtree"),
}


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("when", ["before", "halfway", "after"])
@pytest.mark.parametrize("call", CALLS)
def test_a_writer_that_is_killed_leaves_a_complete_checkpoint(call, when, keep, tmp_path, monkeypatch):
    write(trainer(2), tmp_path, keep)
    owner, name = CALLS[call]
    real, killed = getattr(owner, name), []

    def dies(*arguments, **options):
        killed.append(call)
        if when == "after":
            real(*arguments, **options)
        if when == "halfway" and call == "the state":
            arguments[1].write(b"half of it")
        if when == "halfway" and call == "the manifest":
            (arguments[0] / manifest.NAME).write_text('{"step": 4, "fi')
        if when == "halfway" and call == "the removal":
            next(path for path in arguments[0].rglob("*") if path.is_file()).unlink()
        raise Killed

    if call == "the removal" and keep == 2:
        write(trainer(3), tmp_path, keep)  # or there is nothing to remove
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(owner, name, dies)
        write(trainer(4), tmp_path, keep)
    assert killed
    left = checkpoint.newest(tmp_path)
    assert left is not None
    step = manifest.verify(left)["step"]
    assert step in (2, 3, 4) and float(checkpoint.read(left)["state_dict"]["w"][0]) == step
    write(trainer(4), tmp_path, keep)
    assert checkpoint.steps(checkpoint.newest(tmp_path)) == 4
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    assert len(names(tmp_path)) <= keep


def test_a_full_disk_leaves_the_checkpoints_before_it(tmp_path):
    write(trainer(2), tmp_path, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match="step=4 could not be saved: File too large"):
            write(trainer(4), tmp_path, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step=2"]
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints" / "step=2"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """`/sys` can be written by nobody, root included."""
    (tmp_path / "checkpoints").symlink_to("/sys")
    with pytest.raises(OSError, match="step=4 could not be saved: Operation not permitted"):
        write(trainer(4), tmp_path, keep=1)


@pytest.mark.parametrize(
    "ranks", [{}, *(pytest.param(s, marks=pytest.mark.slow) for s in ({"strategy": "ddp"}, {"strategy": "fsdp2"}))]
)
def test_a_run_whose_disk_is_full_says_so_and_can_be_resumed(ranks, dlm, small, tmp_path):
    """The last rank's files are cut at 20 kB; under DDP that rank writes none, so there the first one's are."""
    text = FSIZE.replace("trainer.world_size - 1", "0") if ranks.get("strategy") == "ddp" else FSIZE
    (tmp_path / "filler.py").write_text(text)
    keep = "{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints, init_args: {every_n_steps: 2}}"
    more = {"data__batch_size": 2, "trainer__devices": 2, "trainer__strategy": ranks["strategy"]} if ranks else {}
    words = small(trainer__callbacks=f"[{{class_path: filler.Fill}}, {keep}]", trainer__logger="false", **more)
    done = dlm(
        "fit", "block_causal", *words, "--run", "run", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, fails=True
    )
    run = tmp_path / "run"
    assert done.stderr.count("dlm: ") == 1
    why = "a file cannot be written to its end" if ranks.get("strategy") == "fsdp2" else "File too large"
    assert f"dlm: {run}/checkpoints/step=4 could not be saved: {why}" in done.stderr
    assert names(run) == ["step=2"]
    (tmp_path / "filler.py").write_text(text.replace("== 4", "== 7"))
    dlm("resume", "run", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert names(run) == ["step=4", "step=6"]
    assert os.listdir(run / "checkpoints" / "step=6")
