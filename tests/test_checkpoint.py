"""Checkpoints: written at the last step, read without running code, and refused where they do not belong."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from dlm_lightning import checkpoint
from dlm_lightning.checkpoint import Checkpoints
from dlm_lightning.module import FACTS
from dlm_lightning.training import reopen

CLASS = "dlm_lightning.checkpoint.Checkpoints"


class RunsCode:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run folder's `checkpoints`, in which step 4 is complete."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save({"global_step": 4, FACTS: {}, "state_dict": {"w": torch.ones(1000)}}, folder / "step=4.ckpt")
    return folder


def truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


# Which are complete


def test_newest_counts_steps_as_numbers_and_goes_by_what_the_file_says(folder, tmp_path):
    for step in (20, 100, 9):
        torch.save({"global_step": step, FACTS: {}}, folder / f"step={step}.ckpt")
    assert checkpoint.newest(tmp_path) == folder / "step=100.ckpt"
    (folder / "step=100.ckpt").rename(folder / "another-name.ckpt")
    assert checkpoint.newest(tmp_path) == folder / "another-name.ckpt"


def test_newest_of_a_folder_without_checkpoints_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert checkpoint.newest(tmp_path) is None


@pytest.fixture
def sharded(folder) -> Path:
    """A sharded checkpoint of step 8 as torch and Lightning write it, beside that of step 4."""
    path = folder / "step=8.ckpt"
    dcp.save({"w": torch.ones(1000), "lr": 0.1, "betas": (0.9, 0.95)}, checkpoint_id=path)
    torch.save({"global_step": 8, FACTS: {}}, path / "meta.pt")
    return path


def test_a_complete_sharded_checkpoint_is_the_newest(sharded, tmp_path):
    assert checkpoint.newest(tmp_path) == sharded


@pytest.mark.parametrize("part", ["meta.pt", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("share", [None, 0.0, 0.5, 0.99])
def test_a_sharded_checkpoint_without_a_part_is_passed_over(part, share, sharded, folder, tmp_path):
    if share is None:
        (sharded / part).unlink()
    else:
        truncate(sharded / part, share)
    assert checkpoint.newest(tmp_path) == folder / "step=4.ckpt"


def test_a_poisoned_index_runs_no_code(sharded, folder, tmp_path):
    index = pickle.loads((sharded / ".metadata").read_bytes())
    index.storage_meta = RunsCode(tmp_path / "ran")
    (sharded / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="could run code; refused"):
        checkpoint.read(sharded)
    assert checkpoint.newest(tmp_path) == folder / "step=4.ckpt"
    assert not (tmp_path / "ran").exists()
    dcp.FileSystemReader(sharded).read_metadata()  # it would have run: the check above can fail
    assert (tmp_path / "ran").exists()


def test_a_poisoned_value_in_a_shard_runs_no_code(folder, tmp_path):
    path = folder / "step=8.ckpt"
    dcp.save({"w": torch.ones(10), "lr": RunsCode(tmp_path / "ran")}, checkpoint_id=path)
    torch.save({"global_step": 8, FACTS: {}}, path / "meta.pt")
    with pytest.raises(ValueError, match="could run code; refused"):
        checkpoint.read(path)
    assert not (tmp_path / "ran").exists()
    dcp.load({"w": torch.ones(10), "lr": 0.1}, checkpoint_id=path)
    assert (tmp_path / "ran").exists()


def test_a_sharded_checkpoint_on_one_device_is_refused(sharded, refused, small, tmp_path):
    said = refused("fit", "block_causal", *small(), "--ckpt_path", sharded, cwd=tmp_path)
    assert said == f"{sharded} is a sharded checkpoint, which needs trainer.strategy=fsdp2"


def damage(kind: str, path: Path, marker: Path) -> None:
    """Write something that is no checkpoint."""
    if kind.startswith("truncated"):
        torch.save({"global_step": 8, FACTS: {}, "state_dict": {"w": torch.ones(1000)}}, path)
        truncate(path, float(kind.split()[1]))
    elif kind == "pickle":
        torch.save({"global_step": 8, FACTS: {}, "more": RunsCode(marker)}, path)
    elif kind == "old pickle":
        torch.save({"global_step": 8, FACTS: {}, "more": RunsCode(marker)}, path, _use_new_zipfile_serialization=False)
    elif kind == "foreign":
        torch.save({"w": torch.ones(3)}, path)
    elif kind == "tensor":
        torch.save(torch.ones(3), path)
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to nothing":
        path.symlink_to("nowhere")


DAMAGES = {
    "truncated 0.0": "is damaged",
    "truncated 0.3": "is damaged",
    "truncated 0.99": "is damaged",
    "pickle": "could run code; refused",
    "old pickle": "is damaged",
    "foreign": "was not written by dlm_lightning",
    "tensor": "was not written by dlm_lightning",
    "text": "is damaged",
    "fifo": "there is no checkpoint",
    "link to nothing": "there is no checkpoint",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_no_checkpoint_is_passed_over_and_refused_and_runs_no_code(kind, folder, tmp_path):
    path, marker = folder / "step=8.ckpt", tmp_path / "ran"
    damage(kind, path, marker)
    assert checkpoint.newest(tmp_path) == folder / "step=4.ckpt"
    with pytest.raises((ValueError, FileNotFoundError), match=DAMAGES[kind]) as caught:
        checkpoint.read(path)
    assert str(path) in str(caught.value)
    assert not marker.exists()
    if "pickle" in kind:  # it would have run: the check above can fail
        torch.load(path, weights_only=False)
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
    assert [path.name for path in found] == [f"step={step}.ckpt" for step in left]
    assert [checkpoint.read(path)["global_step"] for path in found] == left


def test_load_weights_puts_a_checkpoint_into_a_model_of_its_recipe(finished):
    _, cli = reopen(str(finished), "--trainer.logger=false")
    recipe = cli.model
    recipe.configure_model()
    content = checkpoint.load_weights(recipe, checkpoint.newest(finished))
    assert content["global_step"] == 6
    saved = torch.load(finished / "checkpoints" / "step=6.ckpt", weights_only=True)["state_dict"]
    assert len(saved) > 20
    for name, tensor in recipe.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    source = recipe.source.read("model.layers.0.mlp.up_proj.weight")
    assert not torch.equal(saved["denoiser.network.model.layers.0.mlp.up_proj.weight"], source)


def test_a_run_starts_from_another_ones_checkpoint(finished, typed, small, tmp_path):
    """`--ckpt_path` continues at the checkpoint's step, in a folder of its own."""
    early = f"[{{class_path: {CLASS}, init_args: {{every_n_steps: 2, keep: 9}}}}]"
    assert typed("fit", "block_causal", *small(trainer__callbacks=early), "--run", "a", cwd=tmp_path).code == 0
    start = ["--ckpt_path", "a/checkpoints/step=4.ckpt", "--run", "b"]
    said = typed("fit", "block_causal", *small(trainer__callbacks=early), *start, cwd=tmp_path)
    assert said.code == 0, said.err
    assert sorted(path.name for path in (tmp_path / "b" / "checkpoints").iterdir()) == ["step=6.ckpt"]
    ends = [checkpoint.read(tmp_path / run / "checkpoints" / "step=6.ckpt")["state_dict"] for run in ("a", "b")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("recipe", "override", "name"),
    [
        ("full_bidirectional", {}, "recipe dlm_lightning.recipes.block_causal.BlockCausal, "),
        ("block_causal", {"model__source": "other"}, "model.source "),
        ("block_causal", {"model__block_size": 8}, "model.block_size 16, this run has 8"),
        ("block_causal", {"model__context": "noisy"}, "model.context clean, this run has noisy"),
        ("block_causal", {"model__context_rank": "causal"}, "model.context_rank block, this run has causal"),
        ("block_causal", {"model__shift": "next_token"}, "model.shift none, this run has next_token"),
        ("block_causal", {"model__lr": 0.5}, "model.lr "),
        ("block_causal", {"model__noise__half_life": 0.2}, "model.noise.half_life 0.1, this run has 0.2"),
        ("block_causal", {"model__mask_token": "Z"}, "model.mask_id 300, this run has "),
        (
            "block_causal",
            {"trainer__accumulate_grad_batches": 2, "data__batch_size": 2},
            "trainer.accumulate_grad_batches 1, this run has 2",
        ),
        ("block_causal", {"trainer__max_steps": 9}, "trainer.max_steps 6, this run has 9"),
        ("block_causal", {"data__seed": 1}, "data.seed 0, this run has 1"),
        ("block_causal", {"data__row_length": 32}, "data "),
        ("block_causal", {"data__batch_size": 2}, "global batch size 4, this run has 2"),
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
    said = refused("fit", recipe, *words, "--ckpt_path", "done/checkpoints/step=6.ckpt", cwd=tmp_path)
    assert said.startswith(f"the checkpoint was made with {name}")


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "truncated 0.3"])
def test_fit_refuses_what_is_no_checkpoint(kind, refused, small, tmp_path):
    marker = tmp_path / "ran"
    damage(kind, tmp_path / "a.ckpt", marker)
    said = refused("fit", "block_causal", *small(), "--ckpt_path", "a.ckpt", cwd=tmp_path)
    assert DAMAGES[kind] in said and "a.ckpt" in said
    assert not marker.exists()


def test_fit_refuses_another_projects_lightning_checkpoint(refused, small, tmp_path):
    content = {"global_step": 3, "epoch": 0, "state_dict": {}, "pytorch-lightning_version": "2.6.0"}
    content |= {"loops": {}, "optimizer_states": [], "lr_schedulers": []}
    torch.save(content, tmp_path / "a.ckpt")
    said = refused("fit", "block_causal", *small(), "--ckpt_path", "a.ckpt", cwd=tmp_path)
    assert "not written by dlm_lightning" in said


# Resume and validate


def test_a_finished_run_is_not_resumed(finished, refused, tmp_path):
    assert refused("resume", "done", cwd=tmp_path) == "done is finished: it has made all 6 of its 6 steps"


@pytest.mark.parametrize("command", ["validate", "summary"])
def test_what_needs_a_checkpoint_says_so(command, finished, refused, tmp_path):
    (finished / "checkpoints" / "step=6.ckpt").unlink()
    assert refused(command, "done", cwd=tmp_path).startswith("done has no complete checkpoint to ")


@pytest.mark.parametrize("command", ["validate", "summary", "resume"])
def test_a_run_whose_only_checkpoint_is_poisoned_runs_no_code(command, finished, typed, tmp_path):
    path, marker = finished / "checkpoints" / "step=6.ckpt", tmp_path / "ran"
    torch.save(torch.load(path, weights_only=True) | {"more": RunsCode(marker)}, path)
    said = typed(command, "done", cwd=tmp_path)
    assert (said.code == 0) == (command == "resume"), said.err  # which starts again from step 0
    assert not marker.exists()


def test_a_run_whose_configuration_was_changed_refuses_its_checkpoint(finished, typed, tmp_path):
    path = finished / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["init_args"]["block_size"] = 8
    config["trainer"]["max_steps"] = 9
    path.write_text(yaml.safe_dump(config))
    kept = {name: (finished / name).read_bytes() for name in ("checkpoints/step=6.ckpt", "config.yaml", "origin.json")}
    said = typed("resume", "done", cwd=tmp_path)
    assert (said.code, said.err) == (1, "dlm: the checkpoint was made with model.block_size 16, this run has 8\n")
    assert kept == {name: (finished / name).read_bytes() for name in kept}
