"""Ctrl-C at safe points only: the step under way is finished, so that the state saved after it is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self


class Stopped(Exception):
    """Raised at a safe point after Ctrl-C was pressed."""


class Interrupt:
    """Turns the first SIGINT into a request that ``check`` answers; the second ends the program at once.

    Args:
        on_request: called once, from the signal handler, when the request comes in.
    """

    def __init__(self, on_request: Callable[[], None]) -> None:
        self._on_request = on_request
        self._requested = False
        self._before: Any = None

    def __enter__(self) -> Self:
        # only the main thread may set handlers; elsewhere Ctrl-C is that thread's owner's business
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._restore()
        self._on_request()

    def check(self) -> None:
        """A safe point.

        Raises:
            Stopped: Ctrl-C was pressed.
        """
        if self._requested:
            raise Stopped
