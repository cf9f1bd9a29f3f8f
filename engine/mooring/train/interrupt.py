"""Ctrl-C and preemption at safe points only: the step under way is finished, the state saved after it is whole."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from mooring.distributed import ALONE, Ranks
from mooring.stop_signals import PREEMPTION, STOPS, is_unwanted

# One preemption may arrive more than once, from the scheduler and from a parent process that passes it on.
_SAME_REQUEST_SECONDS = 0.5


class Stopped(Exception):
    """Raised at a safe point after a signal came in.

    Attributes:
        preempted: it was a scheduler's signal, not Ctrl-C.
    """

    def __init__(self, *, preempted: bool) -> None:
        super().__init__("preempted" if preempted else "interrupted")
        self.preempted = preempted


class Interrupt:
    """Turns the first of ``STOPS`` into a request that ``check`` answers; the second ends the program.

    Args:
        on_request: called once, from the signal handler, when the request comes in.
        ranks: those that stop together, wherever the signal came in; they ask at the same points.
    """

    def __init__(self, on_request: Callable[[], None], ranks: Ranks = ALONE) -> None:
        self._on_request = on_request
        self._ranks = ranks
        self._requested: int | None = None
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # only the main thread may set handlers; elsewhere signals are that thread's owner's business
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if not is_unwanted(number):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, before in self._before.items():
            # None: a handler that was not installed from Python, and cannot be put back
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested is None:
            self._requested, self._when = number, time.monotonic()
            self._on_request()
        elif number == signal.SIGINT or time.monotonic() - self._when > _SAME_REQUEST_SECONDS:
            self._restore()
            os.kill(os.getpid(), number)  # as if there had never been a handler

    def check(self) -> None:
        """A safe point.

        Raises:
            Stopped: a signal came in, here or on another rank.
        """
        asked = self._ranks.all_reduce_(torch.tensor(self._requested or 0), "max").item()
        if asked:
            raise Stopped(preempted=asked in PREEMPTION)
