"""Signals: the first is noted or leaves, the second ends the process whatever it is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dlm_lightning import interruption

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 75}
HUNG = """
import ctypes
libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(128)
libc.pthread_mutex_lock(lock)
print("hangs", flush=True)
libc.pthread_mutex_lock(lock)  # as in a collective call: no Python runs here any more
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """`process(body)`: a program that runs `body` while it listens, from the first line that it prints.

    What follows that line is read by `stdout.read()`: `communicate` would miss what came together with it.
    """
    started = []

    def start(body: str, before: str = "") -> subprocess.Popen:
        lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
        program = tmp_path / "program.py"
        program.write_text(
            "import os, signal, sys, threading, time\nfrom dlm_lightning import interruption\n"
            f"signal.signal(signal.SIGINT, signal.default_int_handler)\ninterruption.hold()\n{before}\n"
            f"with interruption.listen():\n{lines}"
        )
        running = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(running)
        running.stdout.readline()
        return running

    yield start
    for running in started:
        running.kill()
        running.communicate()


@pytest.mark.parametrize("name", CODES)
def test_the_first_signal_leaves_at_once_if_nobody_looks(name, process):
    running = process("print('ready', flush=True)\nwhile True: time.sleep(60)")
    running.send_signal(getattr(signal, name))
    _, said = running.communicate(timeout=60)
    assert (running.returncode, said) == (CODES[name], "")


@pytest.mark.parametrize("name", CODES)
def test_the_first_signal_waits_for_who_looks(name, process):
    running = process(
        "interruption.defer()\nprint('ready', flush=True)\nwhile not interruption.asked(): time.sleep(0.01)\n"
        "print('code', interruption.asked())"
    )
    running.send_signal(getattr(signal, name))
    assert running.communicate(timeout=60) == (f"code {CODES[name]}\n", "")
    assert running.returncode == 0


@pytest.mark.parametrize("name", CODES)
def test_the_second_signal_ends_a_process_that_hangs(name, process):
    running = process("interruption.defer()\n" + HUNG)
    with pytest.raises(subprocess.TimeoutExpired):
        running.send_signal(signal.SIGTERM)
        running.wait(timeout=2 * interruption.ONE)
    running.send_signal(getattr(signal, name))
    assert running.wait(timeout=60) == CODES[name]


def test_signals_of_one_moment_count_as_one(process):
    """A terminal sends Ctrl-C to all, and a launcher passes it on."""
    running = process(
        "interruption.defer()\nprint('ready', flush=True)\nwhile not interruption.asked(): time.sleep(0.01)\n"
        "time.sleep(0.5)\nprint('code', interruption.asked())"
    )
    running.send_signal(signal.SIGINT)
    running.send_signal(signal.SIGTERM)
    running.wait(timeout=60)
    assert running.stdout.read() in ("code 130\n", "code 143\n")


def test_a_signal_that_came_early_is_not_lost(process):
    running = process("time.sleep(60)", before="os.kill(os.getpid(), signal.SIGUSR1)")
    assert running.wait(timeout=60) == 75


def test_what_is_ignored_stays_ignored(process):
    """As with `nohup`, and as a shell has it for the SIGINT of its background jobs."""
    running = process(
        "print('ready', flush=True)\nos.kill(os.getpid(), signal.SIGINT)\nprint(interruption.asked())",
        before="signal.signal(signal.SIGINT, signal.SIG_IGN)",
    )
    assert running.wait(timeout=60) == 0
    assert running.stdout.read() == "0\n"


def test_processes_that_load_batches_leave_signals_to_the_main_one(process):
    running = process(
        "child = os.fork()\nif not child:\n    interruption.ignore(0)\n"
        "    for s in interruption.CODES: os.kill(os.getpid(), s)\n    os._exit(7)\n"
        "interruption.defer()\nprint('ready', flush=True)\nprint(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "print(interruption.asked())"
    )
    assert running.wait(timeout=60) == 0
    assert running.stdout.read() == "7\n0\n"


def test_listening_leaves_everything_as_it_was():
    def state() -> tuple[object, ...]:
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        return wakeup, [signal.getsignal(signum) for signum in interruption.CODES], sorted(os.listdir("/proc/self/fd"))

    before = state()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    for _ in range(5):
        with pytest.raises(KeyError), interruption.listen():
            assert signal.getsignal(signal.SIGTERM) is interruption._note
            raise KeyError
    for thread in threading.enumerate():
        if thread.name == "signals":
            thread.join(timeout=60)
    assert state() == before
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def test_another_thread_runs_without_handlers():
    seen = []

    def work() -> None:
        with interruption.listen():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
