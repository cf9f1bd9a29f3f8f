"""Work that is done while the training goes on: one piece at a time, and no error of it is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs one job at a time in a thread of its own.

    The thread is no daemon: a program that ends waits for the job, so that a checkpoint that was begun is finished.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Waits for the job before it, then starts this one and returns.

        Raises:
            Exception: what the job before it raised; this one is not started.
        """
        self.wait()

        def run() -> None:
            try:
                job()
            except BaseException as err:  # handed to the thread that asked for the job
                self._error = err

        self._thread = threading.Thread(target=run, name="mooring-checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Returns at once.

        Raises:
            Exception: what a finished job raised.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when no job is under way.

        Raises:
            Exception: what the job raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
