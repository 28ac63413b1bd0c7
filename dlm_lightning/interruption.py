"""SIGTERM, SIGUSR1 and Ctrl-C ask a run to leave: after its step, or at once if they come twice. No torch here."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # as a shell gives them
if hasattr(signal, "SIGUSR1"):  # not on Windows
    CODES[signal.SIGUSR1] = 75  # EX_TEMPFAIL of sysexits.h: ask again later
ONE = 1.0  # seconds within which signals count as one: a terminal and a launcher both pass on a Ctrl-C

_asked = 0  # the exit code of the first signal
_deferred = False  # whether somebody looks at `asked` after each step


def hold() -> None:
    """Let SIGUSR1 wait instead of ending this process, until `listen`; before what starts threads is imported."""
    _mask(signal.SIG_BLOCK)


@contextmanager
def listen() -> Iterator[None]:
    """Inside, the first signal leaves by SystemExit: at once, or after `defer` when `asked` is looked at.

    A second one ends the process, even while it waits in a collective call: Python's own handlers would only run after
    that, so a thread reads what the system writes into a pipe. What the process ignores, as `nohup` has it, stays so.
    """
    global _asked, _deferred
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return
    _asked, _deferred = 0, False
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    handlers = {signum: signal.getsignal(signum) for signum in CODES}
    for signum, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(signum, _note)
    try:
        _mask(signal.SIG_UNBLOCK)
        yield
    finally:
        _mask(signal.SIG_BLOCK)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writer)  # which ends the thread


def defer() -> None:
    """From here on a signal waits for `asked`."""
    global _deferred
    _deferred = True


def asked() -> int:
    """The exit code to leave with, 0 if no signal has come."""
    return _asked


def ignore(*_: Any) -> None:
    """Leave signals to the main process; for the processes that load batches, which it ends itself."""
    signal.set_wakeup_fd(-1)
    for signum in CODES:
        signal.signal(signum, signal.SIG_IGN)


def outlive(parent: int, seconds: float) -> None:
    """Wait until a parent process has ended, for some seconds at most."""
    end = time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < end:
        time.sleep(0.1)


def _mask(how: int) -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(how, {signal.SIGUSR1})


def _note(signum: int, _: Any) -> None:
    global _asked
    if _asked:
        return
    _asked = CODES[signal.Signals(signum)]
    if not _deferred:
        raise SystemExit(_asked)


def _watch(reader: int) -> None:
    first = 0.0
    while byte := os.read(reader, 1):
        if byte[0] not in set(CODES):
            continue
        if not first:
            first = time.monotonic()
        elif time.monotonic() > first + ONE:
            os._exit(CODES[signal.Signals(byte[0])])
    os.close(reader)
