"""The signals that ask a run to stop, and what they mean before there is anything to save."""

from __future__ import annotations

import signal
from types import FrameType

from mooring.exit_codes import PREEMPTED

# A scheduler that takes the machine away sends one of these, often to every process of the job; the last one comes
# from a terminal or a connection that is lost.
PREEMPTION = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
STOPS = (signal.SIGINT, *PREEMPTION)


def is_unwanted(number: int) -> bool:
    """Whether whoever started this program wants it to live through the signal, as nohup does."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def leave_when_preempted() -> None:
    """Until there is a state to save, a scheduler's signal ends the program as what it is: a preemption.

    For a program's main thread, before anything slow. ``train.interrupt.Interrupt`` takes the signals over later.
    """
    for number in PREEMPTION:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(PREEMPTED)
