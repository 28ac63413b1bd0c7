"""The folder of docs/plugins.md, as it stands there: each kind of plug-in runs, and is what it says."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pytest
import torch

from dlm_lightning import checkpoint
from dlm_lightning.generate import read
from dlm_lightning.reopening import restore

PAGE = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()
FILES = dict(re.findall(r"```(?:python|yaml)\n# mine/([\w.]+)\n(.*?)```", PAGE, re.S))


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return folder


def test_the_page_has_every_file_of_its_folder():
    listed = re.findall(r"^      ([\w.]+) ", PAGE, re.M)
    assert set(listed) == set(FILES) and len(FILES) == 6


def test_its_commands_run(mine, dlm, row_cache, tmp_path):
    commands = re.findall(r"^    dlm (.*)$", PAGE, re.M)
    assert len(commands) == 2
    dlm("fit", "mine/mine.yaml", "--run", "runs/mine", cwd=tmp_path)
    with (tmp_path / "runs/mine/metrics.csv").open(newline="") as file:
        scored = [float(row["tokens/scored"]) for row in csv.DictReader(file) if row.get("tokens/scored")]
    assert len(scored) == 4 and scored == sorted(scored) and scored[0] > 0
    said = dlm("generate", "runs/mine", "--plan", "mine/plan.yaml", "--prompt", "one two", cwd=tmp_path)
    assert said.stdout.startswith("one two")
    assert re.search(r"in \d+ forwards, (1\.\d\d|2\.00) per forward", said.stderr), said.stderr


def test_the_recipe_masks_whole_runs(mine, dlm, make_batch, tmp_path, monkeypatch):
    dlm("fit", "mine/mine.yaml", "trainer.max_steps=1", "--run", "run", cwd=tmp_path)
    monkeypatch.syspath_prepend(str(mine))
    _, recipe, _ = restore(str(tmp_path / "run"))
    batch = make_batch([[15]] * 40, length=15)
    batch = batch._replace(maskable_BL=torch.ones_like(batch.maskable_BL), u_BL=torch.rand(40, 15))
    (masked,) = recipe.corrupt(batch, recipe.pattern)
    runs_BR3 = masked.mask_BL.unflatten(1, (5, 3))
    assert torch.equal(runs_BR3.any(2), runs_BR3.all(2)) and 20 < runs_BR3.all(2).sum() < 180
    assert len({tuple(row) for row in runs_BR3.all(2).tolist()}) > 10
    stated = checkpoint.load(tmp_path / "run" / "checkpoints" / "step=1" / checkpoint.STATE)[checkpoint.FACTS]
    assert stated["model.run"] == 3


def test_the_decoder_is_one_of_pairs(mine):
    plan = read(str(mine / "plan.yaml"), ["selector.tokens=3"])
    assert type(plan.selector).__name__ == "InPairs" and plan.selector.tokens == 3
