"""SIGUSR1 asks a run to make room: it waits until the run looks, which is after an optimizer step. No torch here."""

from __future__ import annotations

import signal

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: ask again later
SUPPORTED = hasattr(signal, "pthread_sigmask")  # not by Windows


def hold() -> None:
    """Let SIGUSR1 wait instead of ending this process.

    Threads and child processes that start later inherit this, so that a scheduler's signal to the whole job kills no
    process that loads batches: it has to come before anything that starts threads is imported.
    """
    if SUPPORTED:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def asked() -> bool:
    """Whether a SIGUSR1 is waiting."""
    return SUPPORTED and signal.SIGUSR1 in signal.sigpending()
