"""Signals and the processes that prepare images: a stop of the run is its main process's matter alone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mooring.stop_signals import STOPS


@contextmanager
def undisturbed_workers() -> Iterator[None]:
    """Processes that are forked within it get none of the signals that stop a run.

    They call ``end_with_parent`` first. A worker that dies is noticed where its next item is asked for: torch's own
    handler of ``SIGCHLD`` would raise in the middle of whatever the main thread does.
    """
    in_main = threading.current_thread() is threading.main_thread()
    on_death = signal.getsignal(signal.SIGCHLD) if in_main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # inherited by a fork, and kept there
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if in_main:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if on_death is None else on_death)


def end_with_parent(worker: int) -> None:
    """Of a worker, first of all: its parent may still end it by ``SIGTERM``; nobody else's counts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # also where it was not forked

    def wait() -> None:
        while True:
            if signal.sigwaitinfo([signal.SIGTERM]).si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
