"""The processes of a comparison: commands that end when it ends, and whose folder nobody else works in."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dlm_lightning import runs

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
PATIENCE = 120.0  # seconds that the processes of a comparison which was killed have to save and leave


class Failed(RuntimeError):
    """A command that failed, with what it said last."""


class Processes:
    """Runs `dlm` commands in a comparison's folder, each with a log below `logs/`.

    Args:
        place: the folder.
        cwd: where the commands' relative paths begin.
        jobs: how many there are at a time, which share out the cores.
        lock: the file that keeps others out; every process holds it until it is gone.
    """

    def __init__(self, place: Path, cwd: str, jobs: int, lock: IO[str]) -> None:
        self.logs, self.cwd, self.jobs, self.lock = place / "logs", cwd, jobs, lock
        self.logs.mkdir(exist_ok=True)
        self.stopped = False
        self._mutex = threading.Lock()
        self._running: set[subprocess.Popen] = set()

    def log(self, name: str) -> Path:
        """Where the commands of this name say what they say."""
        return self.logs / f"{name}.log"

    def dlm(self, name: str, *words: object) -> None:
        """Run a command to its end; raises Failed with its last sentence."""
        command = [sys.executable, "-m", "dlm_lightning.cli", *map(str, words)]
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs)), **os.environ}
        environment.pop(runs.RUN_VARIABLE, None)
        with self.log(name).open("a") as file:
            start = file.tell()
            file.write(f"$ dlm {' '.join(map(str, words))}\n")
            file.flush()
            with self._mutex:
                if self.stopped:
                    raise Failed("stopped")
                child = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=self.cwd,
                    env=environment,
                    start_new_session=True,  # a terminal's Ctrl-C comes here, and is handed on once
                    pass_fds=[self.lock.fileno()] if fcntl else [],
                    preexec_fn=_end_with(os.getpid()),
                )
                self._running.add(child)
            code = child.wait()
        with self._mutex:
            self._running.discard(child)
        if code:
            said = [line for line in self._since(name, start) if line.startswith("dlm: ")]
            raise Failed(said[-1].removeprefix("dlm: ") if said else f"exit code {code}")

    def _since(self, name: str, start: int) -> list[str]:
        with self.log(name).open(errors="replace") as file:
            file.seek(start)
            return file.read().splitlines()

    def stop(self) -> None:
        """Ask all processes to save and leave, and wait for them."""
        with self._mutex:
            self.stopped = True
            running = list(self._running)
        for child in running:
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
        for child in running:
            child.wait()


@contextmanager
def alone(place: Path, cwd: str, jobs: int) -> Iterator[Processes]:
    """Processes in a comparison's folder, where no other comparison works; all are gone at the end, however it comes.

    Waits for those that a comparison left behind which was killed. ValueError if another one is at work.
    """
    with (place / LOCK).open("a+") as lock:
        _acquire(lock, place)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        processes = Processes(place, cwd, jobs, lock)
        previous = signal.signal(signal.SIGTERM, _terminated) if _in_main_thread() else None
        try:
            yield processes
        finally:
            processes.stop()
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)


def _acquire(lock: IO[str], place: Path) -> None:
    until = time.monotonic() + PATIENCE
    while fcntl is not None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read().strip()
            if (owner.isdigit() and alive(int(owner))) or time.monotonic() > until:
                raise ValueError(f"another process is comparing in {place}; wait for it, or end it") from error
        time.sleep(0.2)


def alive(process: int) -> bool:
    """Whether a process of this number is there and not dead already, waiting to be noticed."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # no Linux
        return True


def _end_with(parent: int) -> Callable[[], None] | None:
    """What a child does first, so that it is asked to stop when this process is gone, however that ends; Linux only."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return ask


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _terminated(*_: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)
