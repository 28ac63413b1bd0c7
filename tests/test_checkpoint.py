"""Checkpoints: written at the last step, read without running code, and refused where they do not belong."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from dlm_lightning import checkpoint, manifest
from dlm_lightning.callbacks.checkpoints import Checkpoints
from dlm_lightning.checkpoint import FACTS, STATE
from dlm_lightning.reopening import reopen

CLASS = "dlm_lightning.callbacks.checkpoints.Checkpoints"


class RunsCode:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved(step, **content)`: a complete checkpoint of that step in the run `tmp_path`."""

    def save(step: int, **content: object) -> Path:
        path = tmp_path / "checkpoints" / f"step={step}"
        path.mkdir(parents=True)
        torch.save({"global_step": step, FACTS: {}, "state_dict": {"w": torch.ones(1000)}, **content}, path / STATE)
        manifest.write(path, manifest.describe(path), step=step)
        return path

    return save


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A complete checkpoint of step 8, sharded as torch and Lightning write it, in the run `tmp_path`."""
    return shards(tmp_path / "checkpoints" / "step=8", w=torch.ones(1000), lr=0.1, betas=(0.9, 0.95))


def shards(path: Path, **content: object) -> Path:
    dcp.save(content, checkpoint_id=path / STATE)
    torch.save({"global_step": 8, FACTS: {}}, path / STATE / "meta.pt")
    return seal(path)


def seal(path: Path) -> Path:
    """State that a folder's files are what they should be, whatever they are."""
    (path / manifest.NAME).unlink(missing_ok=True)
    manifest.write(path, manifest.describe(path), step=8)
    return path


# Which are complete


def test_newest_counts_steps_as_numbers_and_goes_by_what_the_manifest_says(saved, tmp_path):
    for step in (20, 100, 9):
        saved(step)
    folder = tmp_path / "checkpoints"
    assert checkpoint.newest(tmp_path) == folder / "step=100"
    (folder / "step=100").rename(folder / "another-name")
    assert checkpoint.newest(tmp_path) == folder / "another-name"
    assert checkpoint.steps(folder / "another-name") == 100
    assert checkpoint.newest(tmp_path, before=100) == folder / "step=20"
    assert checkpoint.newest(tmp_path, before=9) is None


def test_newest_of_a_run_without_checkpoints_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "checkpoints" / ".step=4").mkdir(parents=True)  # whose writer was killed
    assert checkpoint.newest(tmp_path) is None


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "halve":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["delete", "empty", "halve", "flip a bit"])
@pytest.mark.parametrize("name", [STATE, "manifest.json"])
def test_a_damaged_file_is_named_and_the_one_before_taken(name, how, saved, tmp_path, caplog):
    before, last = saved(4), saved(8)
    damage(last / name, how)
    with caplog.at_level("INFO", "dlm_lightning"):
        assert checkpoint.newest(tmp_path) == before
    assert caplog.text.count("passed over: ") == 1 and str(last / name) in caplog.text
    with pytest.raises(ValueError) as caught:
        checkpoint.read(last)
    assert str(last / name) in str(caught.value)
    damage(before / name, how)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is complete: ") as caught:
        checkpoint.newest(tmp_path)
    assert str(last / name) in str(caught.value)


@pytest.mark.parametrize("how", ["delete", "empty", "halve", "flip a bit"])
@pytest.mark.parametrize("name", ["meta.pt", ".metadata", "__0_0.distcp"])
def test_a_damaged_shard_is_named_and_the_one_before_taken(name, how, saved, sharded, tmp_path, caplog):
    assert checkpoint.newest(tmp_path) == sharded
    before = saved(4)
    damage(sharded / STATE / name, how)
    with caplog.at_level("INFO", "dlm_lightning"):
        assert checkpoint.newest(tmp_path) == before
    assert str(sharded / STATE / name) in caplog.text


@pytest.mark.parametrize("kind", ["a file", "of the first format"])
def test_what_was_never_a_checkpoint_is_not_taken_for_none(kind, tmp_path):
    """Then a resume would begin anew without a word."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ("step=4.ckpt" if kind == "of the first format" else "notes.txt")).touch()
    with pytest.raises(ValueError, match=r"is complete: .*manifest\.json is missing"):
        checkpoint.newest(tmp_path)


# What they may hold


def test_a_poisoned_index_runs_no_code(sharded, tmp_path):
    state = sharded / STATE
    index = pickle.loads((state / ".metadata").read_bytes())
    index.storage_meta = RunsCode(tmp_path / "ran")
    (state / ".metadata").write_bytes(pickle.dumps(index))
    seal(sharded)
    with pytest.raises(ValueError, match="could run code; refused"):
        checkpoint.read(sharded)
    assert not (tmp_path / "ran").exists()
    dcp.FileSystemReader(state).read_metadata()  # it would have run: the check above can fail
    assert (tmp_path / "ran").exists()


def test_a_poisoned_value_in_a_shard_runs_no_code(tmp_path):
    path = shards(tmp_path / "checkpoints" / "step=8", w=torch.ones(10), lr=RunsCode(tmp_path / "ran"))
    with pytest.raises(ValueError, match="could run code; refused"):
        checkpoint.read(path)
    with pytest.raises(ValueError, match="could run code; refused"):
        checkpoint.whole(path / STATE)
    assert not (tmp_path / "ran").exists()
    dcp.load({"w": torch.ones(10), "lr": 0.1}, checkpoint_id=path / STATE)
    assert (tmp_path / "ran").exists()


def wrong(kind: str, path: Path, marker: Path) -> None:
    """Write a complete folder whose state is no checkpoint of ours, or something else in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        path.write_text("a file")
    elif kind == "link to nothing":
        path.symlink_to("nowhere")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
        state, ours = path / STATE, {"global_step": 8, FACTS: {}}
        if kind == "pickle":
            torch.save({**ours, "more": RunsCode(marker)}, state)
        elif kind == "old pickle":
            torch.save({**ours, "more": RunsCode(marker)}, state, _use_new_zipfile_serialization=False)
        elif kind == "foreign":
            torch.save({"w": torch.ones(3)}, state)
        elif kind == "tensor":
            torch.save(torch.ones(3), state)
        elif kind == "text":
            state.write_text("not a checkpoint")
        seal(path)


WRONG = {
    "pickle": "could run code; refused",
    "old pickle": "is damaged or not a checkpoint",
    "foreign": "was not written by dlm_lightning",
    "tensor": "was not written by dlm_lightning",
    "text": "is damaged or not a checkpoint",
    "nothing": "there is no checkpoint",
    "file": "there is no checkpoint",
    "fifo": "there is no checkpoint",
    "link to nothing": "there is no checkpoint",
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_checkpoint_is_refused_and_runs_no_code(kind, refused, small, tmp_path):
    path, marker = tmp_path / "a" / "step=8", tmp_path / "ran"
    wrong(kind, path, marker)
    with pytest.raises((ValueError, FileNotFoundError), match=WRONG[kind]) as caught:
        checkpoint.read(path)
    assert str(path) in str(caught.value)
    said = refused("fit", "block_causal", *small(), "--ckpt_path", "a/step=8", cwd=tmp_path)
    assert WRONG[kind] in said and "a/step=8" in said
    assert not marker.exists()
    if "pickle" in kind:  # it would have run: the check above can fail
        torch.load(path / STATE, weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"keep": 0}, {"keep": -1}])
def test_checkpoints_refuses_to_keep_none(options):
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoints(**options)


# In a run


@pytest.mark.parametrize(
    ("every", "keep", "left"), [(4, 2, [4, 6]), (4, 1, [6]), (2, 2, [4, 6]), (100, 2, [6]), (1, 3, [4, 5, 6])]
)
def test_the_last_step_is_always_kept(every, keep, left, typed, small, tmp_path):
    callbacks = f"[{{class_path: {CLASS}, init_args: {{every_n_steps: {every}, keep: {keep}}}}}]"
    said = typed("fit", "block_causal", *small(trainer__callbacks=callbacks), "--run", "a", cwd=tmp_path)
    assert said.code == 0, said.err
    found = sorted((tmp_path / "a" / "checkpoints").iterdir())
    assert [path.name for path in found] == [f"step={step}" for step in left]
    assert [checkpoint.read(path)["global_step"] for path in found] == left
    assert not list((tmp_path / "a" / "checkpoints").glob(".*"))
    content = manifest.verify(found[-1])
    assert [content[key] for key in ("step", "consumed_samples", "world_size")] == [6, 24, 1]
    assert content["recipe"] == "dlm_lightning.recipes.block_causal.BlockCausal" and content["source"]


def test_load_weights_puts_a_checkpoint_into_a_model_of_its_recipe(finished):
    _, cli = reopen(str(finished), "--trainer.logger=false")
    recipe = cli.model
    recipe.configure_model()
    content = checkpoint.load_weights(recipe, checkpoint.newest(finished))
    assert content["global_step"] == 6
    saved = torch.load(finished / "checkpoints" / "step=6" / "state.ckpt", weights_only=True)["state_dict"]
    assert len(saved) > 20
    for name, tensor in recipe.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    source = recipe.source.read("model.layers.0.mlp.up_proj.weight")
    assert not torch.equal(saved["denoiser.network.model.layers.0.mlp.up_proj.weight"], source)


def test_a_run_starts_from_another_ones_checkpoint(finished, typed, small, tmp_path):
    """`--ckpt_path` continues at the checkpoint's step, in a folder of its own."""
    early = f"[{{class_path: {CLASS}, init_args: {{every_n_steps: 2, keep: 9}}}}]"
    assert typed("fit", "block_causal", *small(trainer__callbacks=early), "--run", "a", cwd=tmp_path).code == 0
    start = ["--ckpt_path", "a/checkpoints/step=4", "--run", "b"]
    said = typed("fit", "block_causal", *small(trainer__callbacks=early), *start, cwd=tmp_path)
    assert said.code == 0, said.err
    assert sorted(path.name for path in (tmp_path / "b" / "checkpoints").iterdir()) == ["step=6"]
    ends = [checkpoint.read(tmp_path / run / "checkpoints" / "step=6")["state_dict"] for run in ("a", "b")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("recipe", "override", "name"),
    [
        ("full_bidirectional", {}, "recipe dlm_lightning.recipes.block_causal.BlockCausal, "),
        ("block_causal", {"model__source": "other"}, "model.source "),
        ("block_causal", {"model__block_size": 8}, "model.block_size 16, this run has 8"),
        ("block_causal", {"model__context": "noisy"}, "model.context clean, this run has noisy"),
        ("block_causal", {"model__context_rank": "causal"}, "model.context_rank block, this run has causal"),
        ("block_causal", {"model__views": 2}, "model.views 1, this run has 2"),
        ("block_causal", {"model__shift": "next_token"}, "model.shift none, this run has next_token"),
        ("block_causal", {"model__lr": 0.5}, "model.lr "),
        ("block_causal", {"model__noise__half_life": 0.2}, "model.noise.half_life 0.1, this run has 0.2"),
        ("block_causal", {"model__mask_token": "Z"}, "model.mask_id 300, this run has "),
        ("block_causal", {"trainer__max_steps": 9}, "trainer.max_steps 6, this run has 9"),
        ("block_causal", {"data__seed": 1}, "data.seed 0, this run has 1"),
        ("block_causal", {"data__row_length": 32}, "data "),
        ("block_causal", {"data__batch_size": 2}, "global batch size 4, this run has 2"),
        ("block_causal", {"trainer__accumulate_grad_batches": 2}, "global batch size 4, this run has 8"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(
    recipe, override, name, finished, refused, small, source_folder, tmp_path
):
    if override == {"model__source": "other"}:
        copy = shutil.copytree(source_folder("qwen3", tied=True), tmp_path / "other")
        with (copy / "model.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")
    words = small(trainer__logger="false", trainer__callbacks="[]", **override)
    said = refused("fit", recipe, *words, "--ckpt_path", "done/checkpoints/step=6", cwd=tmp_path)
    assert said.startswith(f"the checkpoint was made with {name}")


def test_fit_refuses_another_projects_lightning_checkpoint(refused, small, tmp_path):
    content = {"global_step": 3, "epoch": 0, "state_dict": {}, "pytorch-lightning_version": "2.6.0"}
    content |= {"loops": {}, "optimizer_states": [], "lr_schedulers": []}
    torch.save(content, tmp_path / "a.ckpt")
    said = refused("fit", "block_causal", *small(), "--ckpt_path", "a.ckpt", cwd=tmp_path)
    assert said.startswith("there is no checkpoint a.ckpt, which would be a folder")


# Resume and validate


def test_a_finished_run_is_not_resumed(finished, refused, tmp_path):
    assert refused("resume", "done", cwd=tmp_path) == "done is finished: it has made all 6 of its 6 steps"


@pytest.mark.parametrize("command", ["validate", "summary"])
def test_what_needs_a_checkpoint_says_so(command, finished, refused, tmp_path):
    shutil.rmtree(finished / "checkpoints" / "step=6")
    assert refused(command, "done", cwd=tmp_path).startswith("done has no complete checkpoint to ")


@pytest.mark.parametrize("command", ["validate", "summary", "resume"])
@pytest.mark.parametrize("kind", ["poisoned", "damaged"])
def test_a_run_whose_only_checkpoint_is_wrong_is_refused_and_loses_nothing(kind, command, finished, refused, tmp_path):
    path, marker = finished / "checkpoints" / "step=6", tmp_path / "ran"
    if kind == "poisoned":
        content = torch.load(path / STATE, weights_only=True) | {"more": RunsCode(marker)}
        torch.save(content, path / STATE)
        (path / manifest.NAME).unlink()
        manifest.write(path, manifest.describe(path), step=4)  # or a resume would call it finished
    else:
        damage(path / STATE, "flip a bit")
    said = refused(command, "done", cwd=tmp_path)
    assert str(path) in said
    assert ("could run code; refused" if kind == "poisoned" else "state.ckpt is damaged") in said
    assert not marker.exists()


def test_a_run_whose_configuration_was_changed_refuses_its_checkpoint(finished, typed, tmp_path):
    path = finished / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["init_args"]["block_size"] = 8
    config["trainer"]["max_steps"] = 9
    path.write_text(yaml.safe_dump(config))
    kept = {
        name: (finished / name).read_bytes() for name in ("checkpoints/step=6/state.ckpt", "config.yaml", "origin.json")
    }
    said = typed("resume", "done", cwd=tmp_path)
    assert (said.code, said.err) == (1, "dlm: the checkpoint was made with model.block_size 16, this run has 8\n")
    assert kept == {name: (finished / name).read_bytes() for name in kept}
