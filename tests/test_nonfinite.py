"""A loss or a gradient that is not finite: seen by all ranks, noted with its samples, and left out or the end."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from dlm_lightning.data.stream import TRAIN
from dlm_lightning.noise import uniforms
from dlm_lightning.optimizer import LrScale
from dlm_lightning.recipes.block_causal import BlockCausal

NORM = "model.layers.1.input_layernorm.weight"
SPOILED = '''
import hashlib, json
from pathlib import Path
import lightning as L, torch
from dlm_lightning.noise import Masked
from dlm_lightning.recipes.block_causal import BlockCausal

class Spoiled(BlockCausal):
    """Block-causal, with a number that is none in one step of the last rank.

    Args:
        at: the step.
        what: the weights of the `loss`, all gradients of the `backward` pass, or a parameter's name.
        **options: see `BlockCausal`.
    """

    def __init__(self, at: int, what: str = "loss", **options) -> None:
        super().__init__(**options)
        self.at, self.what = at, what

    @property
    def now(self) -> bool:
        return (self.trainer.global_step + 1, self.trainer.global_rank + 1) == (self.at, self.trainer.world_size)

    def corrupt(self, batch, pattern):
        copies = super().corrupt(batch, pattern)
        factor = torch.nan if self.now and self.what == "loss" else 1
        return [Masked(mask, factor * weight) for mask, weight in copies]

    def training_step(self, batch, number):
        loss = super().training_step(batch, number)
        if self.now and self.what == "backward":
            return loss * torch.nan
        if self.now and self.what != "loss":
            return loss + (self.denoiser.network.get_parameter(self.what) * torch.nan).sum()
        return loss

def digest(tensors):
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in local)).hexdigest()

class Witness(L.Callback):
    """What each rank was given and what it holds afterwards, a line per micro-batch."""

    def on_train_batch_start(self, trainer, recipe, batch, number):
        self.seen = {"step": trainer.global_step + 1, "rank": trainer.global_rank}
        self.seen["micro_batch"] = number % trainer.accumulate_grad_batches
        given = {"place": batch.place_B.tolist(), "ids": batch.ids_BL.tolist(), "u": batch.u_BL.tolist()}
        self.write(trainer, "given", self.seen | given)
        if number == 0 and trainer.is_global_zero:
            rows = [row["ids"].tolist() for row in trainer.datamodule.rows["train"]]
            (Path(trainer.default_root_dir) / "rows.json").write_text(json.dumps(rows))

    def on_train_batch_end(self, trainer, recipe, *_):
        [optimizer] = trainer.optimizers
        moments = [value for state in optimizer.state.values() for value in state.values()]
        held = {"weights": digest(recipe.denoiser.parameters()), "moments": digest(moments)}
        self.write(trainer, "held", self.seen | held | {"lr": optimizer.param_groups[0]["lr"]})

    def write(self, trainer, name, line):
        with (Path(trainer.default_root_dir) / f"{name}-{trainer.global_rank}.jsonl").open("a") as file:
            print(json.dumps(line), file=file)
'''


@pytest.fixture
def spoiled(small, tmp_path, monkeypatch) -> Callable[..., list[object]]:
    """`spoiled(at=3, what="loss", nonfinite="skip", …)`: the words of `dlm fit` for such a run in `<tmp_path>/run`."""
    monkeypatch.syspath_prepend(tmp_path / "own")

    def words(at: int, what: str = "loss", nonfinite: str | None = None, run: str = "run", **more: object):
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own" / "spoiled.py").write_text(SPOILED)
        shipped = Path(__file__).parents[1] / "recipes" / "block_causal.yaml"
        recipe = yaml.safe_load(shipped.read_text())
        recipe["extends"] = [str((shipped.parent / part).resolve()) for part in recipe["extends"]]
        recipe["model"] = {"class_path": "spoiled.Spoiled", "init_args": {"at": at, "what": what}}
        if nonfinite:
            recipe["model"]["init_args"]["nonfinite"] = nonfinite
        (tmp_path / "own" / "spoiled.yaml").write_text(yaml.safe_dump(recipe))
        every = "{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints, init_args: {every_n_steps: 1, keep: 9}}"
        values = {"trainer__callbacks": f"[{every}, {{class_path: spoiled.Witness}}]", "trainer__limit_val_batches": 0}
        return ["fit", "own/spoiled.yaml", *small(**values | more), "--run", run]

    return words


def lines(run: Path, name: str, rank: int = 0) -> list[dict]:
    """What a rank's `Witness` wrote: what it was `given`, or what it `held`."""
    return [json.loads(line) for line in (run / f"{name}-{rank}.jsonl").read_text().splitlines()]


def check_samples(run: Path, step: int, ranks: int, accumulate: int) -> None:
    """The samples of a note are those that the ranks were given: by place, tokens, and the noise of the epoch."""
    note = json.loads((run / "nonfinite" / f"step_{step:06d}.json").read_text())
    assert note["step"] == step
    rows = json.loads((run / "rows.json").read_text())
    given = [line for rank in range(ranks) for line in lines(run, "given", rank) if line["step"] == step]
    assert len(given) == ranks * accumulate
    compared = 0
    for line in given:
        samples = [s for s in note["samples"] if (s["micro_batch"], s["rank"]) == (line["micro_batch"], line["rank"])]
        assert [sample["place"] for sample in samples] == line["place"]
        assert [rows[sample["row"]] for sample in samples] == line["ids"]
        for sample, u in zip(samples, line["u"], strict=True):
            assert uniforms(0, TRAIN, sample["place"], sample["epoch"], 0, len(u))[0].tolist() == u
            compared += 1
    assert compared == len(note["samples"]) == 4


# In the optimizer


class Stub(L.LightningDataModule):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    def samples_of(self, step):
        return []


class States(L.Callback):
    """Weights and optimizer states after each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, recipe, *_):
        states = trainer.optimizers[0].state_dict()["state"]
        tensors = [p.detach() for p in recipe.denoiser.parameters()]
        tensors += [value for state in states.values() for value in state.values()]
        self.steps.append([tensor.clone() for tensor in tensors])


class WithoutStep2(BlockCausal):
    def training_step(self, batch, number):
        loss = super().training_step(batch, number)
        return loss * torch.inf if self.trainer.global_step == 1 else loss


def trained(recipe, batches, folder, **options) -> list[list[torch.Tensor]]:
    """What `States` has seen of a step for each batch, also of a run that was stopped."""
    states = States()
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_checkpointing=False, max_steps=len(batches),
        enable_progress_bar=False, enable_model_summary=False, callbacks=[states], **options,
    )  # fmt: skip
    try:
        trainer.fit(recipe, Stub(batches))
    except FloatingPointError as error:
        assert "step 2 gave numbers that are not finite" in str(error)
        states.steps.append([p.detach() for p in recipe.denoiser.parameters()])
    return states.steps


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("clip", [None, "norm", "value"])
@pytest.mark.parametrize("scale", [LrScale(), LrScale(mask_row=10.0), LrScale(mask_row=1.0, embedding=0.0)])
def test_a_step_that_is_skipped_changes_neither_weights_nor_optimizer(make_recipe, make_batch, tmp_path, scale, clip):
    recipe = make_recipe(WithoutStep2, block_size=4, nonfinite="skip", lr_scale=scale, weight_decay=0.1)
    clipping = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": clip} if clip else {}
    states = trained(recipe, [make_batch([[9, 7]], seed=seed) for seed in range(3)], tmp_path, **clipping)
    first, second, third = states
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert all(tensor.isfinite().all() for tensor in third)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("steps", [2, 4])
def test_a_run_that_stops_has_made_neither_the_step_nor_one_after_it(make_recipe, make_batch, tmp_path, steps):
    """Its numbers are looked at when the next step's gradients are there, or at the end."""
    recipe = make_recipe(WithoutStep2, block_size=4)
    states = trained(recipe, [make_batch([[9, 7]], seed=seed) for seed in range(steps)], tmp_path)
    assert len(states) == 3  # after steps 1 and 2, and when the run had stopped
    weights = [tensors[: len(states[-1])] for tensors in states]
    assert all(torch.equal(a, b) for later in weights[1:] for a, b in zip(weights[0], later, strict=True))


# Through the command line


def test_a_finite_run_writes_nothing(finished):
    assert not (finished / "nonfinite").exists()


@pytest.mark.parametrize("at", [1, 3])
def test_a_run_stops_before_the_step_and_keeps_its_checkpoint(typed, spoiled, tmp_path, at):
    said = typed(*spoiled(at=at), cwd=tmp_path)
    run = tmp_path / "run"
    file = run / "nonfinite" / f"step_00000{at}.json"
    assert said.code == 1
    assert said.err == (
        f"dlm: step {at} gave numbers that are not finite (train/loss, train/grad_norm) and was not made; its samples "
        f"are in {file}; with model.nonfinite: skip, such a step changes nothing\n"
    )
    assert json.loads(file.read_text())["numbers"] == ["train/loss", "train/grad_norm"]
    kept = {path.stem for path in (run / "checkpoints").glob("*")}
    assert kept == {f"step={step}" for step in range(1, at)}
    with (run / "metrics.csv").open(newline="") as table:
        assert [row["train/loss"] == "nan" for row in csv.DictReader(table)] == [*[False] * (at - 1), True]


@pytest.mark.parametrize("what", ["backward", NORM])
def test_a_note_names_the_parameters(typed, spoiled, tmp_path, what):
    said = typed(*spoiled(at=2, what=what, nonfinite="skip", trainer__max_steps=3), cwd=tmp_path)
    assert said.code == 0, said.err
    assert (
        "step 2 gave numbers that are not finite (train/grad_norm) and changes nothing; its samples are in " in said.out
    )
    note = json.loads((tmp_path / "run" / "nonfinite" / "step_000002.json").read_text())
    assert note["numbers"] == ["train/grad_norm"]
    if what == NORM:
        assert note["parameters"] == [NORM]
    else:
        assert NORM in note["parameters"] and len(note["parameters"]) > 20


def test_a_step_that_stopped_its_run_is_made_again(typed, spoiled, tmp_path):
    assert typed(*spoiled(at=3, what=NORM), cwd=tmp_path).code == 1
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    said = typed("replay", "run", "--step", 3, cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert "  train/grad_norm nan: " in said.out and "  train/loss nan: " not in said.out
    assert f"not finite; parameters whose gradient is not:\n    {NORM}\n" in said.out
    note = json.loads((tmp_path / "run" / "nonfinite" / "step_000003.json").read_text())
    table = [line.split() for line in said.out.splitlines()[-len(note["samples"]) :]]
    assert table == [[str(number) for number in sample.values()] for sample in note["samples"]]


def test_a_second_try_that_skips_goes_on_from_the_checkpoint_of_the_one_that_stopped(typed, spoiled, tmp_path):
    typed(*spoiled(at=3), cwd=tmp_path)
    said = typed("resume", "run", "model.nonfinite=skip", cwd=tmp_path)
    assert said.code == 0, said.err
    assert typed(*spoiled(at=3, nonfinite="skip", run="whole"), cwd=tmp_path).code == 0
    ends = [lines(tmp_path / run, "held")[-1] for run in ("run", "whole")]
    assert ends[0] == ends[1]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "what"), [("ddp", "loss"), ("fsdp2", "loss"), ("fsdp2", "backward")])
def test_two_ranks_skip_a_step_that_one_of_them_spoils(dlm, spoiled, tmp_path, strategy, what):
    more = {"data__batch_size": 1, "trainer__devices": 2, "trainer__strategy": strategy}
    words = spoiled(at=3, what=what, nonfinite="skip", trainer__accumulate_grad_batches=2, **more)
    done = dlm(*words, cwd=tmp_path)
    run = tmp_path / "run"
    assert done.stdout.count("and changes nothing") == 1
    check_samples(run, 3, ranks=2, accumulate=2)
    ranks = [[line for line in lines(run, "held", rank) if line["micro_batch"] == 1] for rank in range(2)]
    for steps in ranks:
        held = [(line["weights"], line["moments"]) for line in steps]
        assert len(held) == 6
        assert [held[step] == held[step - 1] for step in range(1, 6)] == [False, True, False, False, False]
        assert len({line["lr"] for line in steps}) == 6, "the schedule goes on"
    if strategy == "ddp":
        assert [line["weights"] for line in ranks[0]] == [line["weights"] for line in ranks[1]]
    with (run / "metrics.csv").open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert [math.isnan(loss) for loss in losses] == [what == "loss" and step == 3 for step in range(1, 7)]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_ranks_stop_together_at_a_step_that_one_of_them_spoils(dlm, spoiled, tmp_path, strategy):
    more = {"data__batch_size": 1, "trainer__devices": 2, "trainer__strategy": strategy}
    done = dlm(*spoiled(at=3, trainer__accumulate_grad_batches=2, **more), cwd=tmp_path, fails=True)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("dlm: ")]
    assert line.startswith(
        "dlm: step 3 gave numbers that are not finite (train/loss, train/grad_norm) and was not made"
    )
    check_samples(tmp_path / "run", 3, ranks=2, accumulate=2)
    assert {path.stem for path in (tmp_path / "run" / "checkpoints").glob("*")} == {"step=1", "step=2"}


def test_killed_after_a_skipped_step_and_resumed_equals_undisturbed(typed, spoiled, tmp_path):
    """As if killed in step 5: what comes after the checkpoint of step 2, or 4, is gone."""
    words = spoiled(at=3, nonfinite="skip", data__batch_size=2, trainer__accumulate_grad_batches=2)
    assert typed(*words, cwd=tmp_path).code == 0
    whole = lines(tmp_path / "run", "held")
    for last in (2, 4):
        for step in range(last + 1, 7):
            shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step={step}")
        (tmp_path / "run" / "held-0.jsonl").unlink()
        said = typed("resume", "run", cwd=tmp_path)
        assert said.code == 0, said.err
        assert lines(tmp_path / "run", "held") == [line for line in whole if line["step"] > last]
