"""Runs an iterator ahead of its reader on a thread, so that the reader finds the next item ready."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class _End:
    """The iterator is exhausted, or raised."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetcher(Generic[Item]):
    """An iterator over the items of ``produce``, made up to ``depth`` ahead on one thread.

    An exception of the producer is raised to the reader after the items that came before it.
    """

    def __init__(self, produce: Generator[Item], depth: int = 2) -> None:
        self._items: queue.Queue[Item | _End] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_run, args=(produce, self._items, self._stop), name="mooring-prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._stop.is_set():
            raise StopIteration
        item = self._items.get()
        if isinstance(item, _End):
            self._stop.set()
            if item.error is not None:
                raise item.error
            raise StopIteration
        return item

    def close(self) -> None:
        """Ends the thread and drops what it made ahead; may be called twice."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._items.get(timeout=0.02)  # makes room, so that a blocked put() returns and sees the stop
        self._thread.join()


def _run(produce: Generator[Item], items: queue.Queue[Item | _End], stop: threading.Event) -> None:
    # a function, not a method: the thread must not keep its reader alive
    error: BaseException | None = None
    try:
        for item in produce:
            items.put(item)
            if stop.is_set():
                break
    except BaseException as err:  # handed to the reader, whatever it is
        error = err
    finally:
        produce.close()
    items.put(_End(error))
