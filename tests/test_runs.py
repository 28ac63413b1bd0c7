"""Run folders: numbered, exclusive, never overwritten."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from dlm_lightning import runs


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """In an empty folder, as a process that no launcher started."""
    monkeypatch.chdir(tmp_path)
    for name in (runs.RUN_VARIABLE, "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_runs_are_numbered_from_one_per_recipe(tmp_path):
    made = [runs.create(recipe, None) for recipe in ("a", "a", "b", "a")]
    assert made == [tmp_path / "runs" / part for part in ("a/1", "a/2", "b/1", "a/3")]
    assert all(run.is_dir() for run in made)


def test_a_number_follows_the_largest_as_a_number_and_gaps_stay(tmp_path):
    for name in ("2", "9", "10", "notes", "11.old"):
        (tmp_path / "runs" / "a" / name).mkdir(parents=True)
    assert runs.create("a", None).name == "11"


def test_runs_that_start_at_once_get_folders_of_their_own():
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: runs.create("a", None), range(24)))
    assert sorted(int(run.name) for run in made) == list(range(1, 25))


def test_a_named_folder_may_be_new_or_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    assert runs.create("a", "empty") == tmp_path / "empty"
    assert runs.create("a", "new/deep") == tmp_path / "new" / "deep"
    assert (tmp_path / "new" / "deep").is_dir()


@pytest.mark.parametrize("name", ["folder", "file"])
def test_a_named_folder_that_holds_something_is_refused(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("kept")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FileExistsError, match=f"--run {name}"):
        runs.create("a", name)
    assert (tmp_path / "folder" / "kept").read_text() == (tmp_path / "file").read_text() == "kept"


def test_the_processes_of_other_local_ranks_use_the_parents_folder(tmp_path, monkeypatch):
    first = runs.create("a", None)
    assert os.environ[runs.RUN_VARIABLE] == str(first)
    (first / "something").touch()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runs.create("a", None) == runs.create("a", str(first)) == first
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["1"]


@pytest.mark.parametrize("launcher", [{"LOCAL_RANK": "0"}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}])
def test_ranks_that_a_launcher_starts_must_be_given_a_folder(launcher, tmp_path, monkeypatch):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="name the run folder by --run DIR"):
        runs.create("a", None)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert runs.create("a", None).name == "1"


def test_a_discarded_run_leaves_its_neighbours():
    kept, discarded = runs.create("a", None), runs.create("a", None)
    (discarded / runs.CONFIG).touch()
    (discarded / "drift").mkdir()
    runs.discard(discarded)
    assert kept.is_dir() and not discarded.exists()


def test_open_run_gives_back_what_was_noted(tmp_path):
    run = runs.create("a", None)
    (run / runs.CONFIG).touch()
    runs.write_origin(run, recipe="a", module=None)
    assert runs.open_run("runs/a/1") == (run, {"recipe": "a", "module": None})


@pytest.mark.parametrize("missing", [runs.CONFIG, runs.ORIGIN])
def test_a_folder_without_config_or_origin_is_no_run(missing, tmp_path):
    runs.write_origin(tmp_path)
    (tmp_path / runs.CONFIG).touch()
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        runs.open_run(str(tmp_path))


def test_a_file_and_a_folder_of_other_things_are_no_runs_to_resume(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thing").touch()
    with pytest.raises(FileExistsError, match="--run file is a file; name a folder"):
        runs.create("mine", "file")
    with pytest.raises(FileExistsError, match="--run folder already holds something else; name a new folder"):
        runs.create("mine", "folder")


def test_a_run_is_trained_by_one_process_at_a_time(finished, typed, tmp_path):
    """Claimed by a process of its own, which is then killed."""
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom dlm_lightning import runs\n"
        "with runs.claimed(Path(sys.argv[1])):\n    print('claimed', flush=True)\n    time.sleep(600)\n"
    )
    shutil.rmtree(finished / "checkpoints")
    before = (finished / "metrics.csv").read_bytes()
    with subprocess.Popen([sys.executable, "-c", program, str(finished)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"claimed\n"
        said = typed("resume", "done", cwd=tmp_path)
        assert (said.code, said.err) == (1, f"dlm: another process is training in {finished}; wait for it, or end it\n")
        assert (finished / "metrics.csv").read_bytes() == before
        other.kill()
    assert typed("resume", "done", cwd=tmp_path).code == 0
