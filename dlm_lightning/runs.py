"""Run folders: made once, never overwritten, and enough to repeat the run. No torch here."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG, ORIGIN, METRICS = "config.yaml", "origin.json", "metrics.csv"
RUN_VARIABLE = "DLM_RUN"  # hands the folder to the processes that Lightning starts for the other local ranks


def is_first_process() -> bool:
    """Whether this process is rank 0, as far as a launcher's environment says."""
    return all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def is_first_of_node() -> bool:
    """Whether this process is the first of its machine, as far as a launcher's environment says."""
    return all(os.environ.get(rank, "0") == "0" for rank in ("LOCAL_RANK", "SLURM_LOCALID"))


def create(recipe: str, folder: str | None) -> Path:
    """Make a new run folder, `runs/<recipe>/<number>` unless named; refuses one that already holds something.

    The other ranks take the first one's: from the environment where Lightning starts them, by name under a launcher
    such as torchrun, where no process is the parent of all.
    """
    if RUN_VARIABLE in os.environ and "LOCAL_RANK" in os.environ:
        return Path(os.environ[RUN_VARIABLE])
    if folder is None and ("LOCAL_RANK" in os.environ or os.environ.get("SLURM_NTASKS", "1") != "1"):
        raise ValueError("name the run folder by --run DIR: the ranks that a launcher starts must agree on it")
    if folder is not None and not folder.strip():
        raise ValueError("--run needs the name of a folder")
    if folder is not None and not is_first_process():
        return Path(folder).expanduser().resolve()
    if folder is None:
        if Path(recipe).name != recipe or recipe in ("", ".."):
            raise ValueError(f"recipe {recipe!r} cannot name a folder below runs/; name the run folder by --run DIR")
        parent = Path("runs") / recipe
        parent.mkdir(parents=True, exist_ok=True)
        number = max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0) + 1
        while True:
            try:
                (parent / str(number)).mkdir()
                break
            except FileExistsError:
                number += 1
        run = parent / str(number)
    else:
        run = Path(folder).expanduser()
        if run.is_file():
            raise FileExistsError(f"--run {folder} is a file; name a folder")
        if run.is_dir() and any(run.iterdir()):
            if (run / CONFIG).is_file():
                raise FileExistsError(f"--run {folder} already holds another run; resume it with `dlm resume {folder}`")
            raise FileExistsError(f"--run {folder} already holds something else; name a new folder")
        run.mkdir(parents=True, exist_ok=True)
    os.environ[RUN_VARIABLE] = str(run.resolve())
    return run.resolve()


def check_inside(run: Path, path: str | Path, key: str) -> None:
    """Raise ValueError, naming the YAML's key, for a path that lies outside of the run folder."""
    if not Path(path).expanduser().resolve().is_relative_to(run.resolve()):
        raise ValueError(f"{key}: {path} lies outside of the run folder {run}; all that a run writes lies in it")


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Keep other processes from training in a run folder meanwhile; ValueError if one does. Rank 0 speaks for its job.

    The system lets go of the claim when the process ends, however it ends.
    """
    if fcntl is None or not is_first_process():
        yield
        return
    with (run / ORIGIN).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is training in {run}; wait for it, or end it") from error
        yield


def discard(run: Path) -> None:
    """Remove the folder of a run that never made a step."""
    shutil.rmtree(run, ignore_errors=True)


def write_origin(run: Path, **facts: Any) -> None:
    """Note where a run's recipe comes from, and what was typed where."""
    (run / ORIGIN).write_text(json.dumps(facts, indent=2) + "\n")


def open_run(folder: str) -> tuple[Path, dict[str, Any]]:
    """A run folder and what was noted about its recipe; raises FileNotFoundError if it is not one."""
    run = Path(folder).expanduser().resolve()
    if not (run / CONFIG).is_file() or not (run / ORIGIN).is_file():
        raise FileNotFoundError(f"{folder} is not a run folder ({CONFIG} or {ORIGIN} is missing)")
    os.environ[RUN_VARIABLE] = str(run)
    return run, json.loads((run / ORIGIN).read_text())


def is_imported(folder: str) -> bool:
    """Whether a run folder holds a model that was trained elsewhere (`dlm import`)."""
    return bool(open_run(folder)[1].get("imported"))


def check_trained(folder: str) -> None:
    """Raise ValueError for the folder of an imported model, which has no steps."""
    if is_imported(folder):
        raise ValueError(f"{folder} is an imported model, which was not trained here; `dlm fit` goes on from it")
