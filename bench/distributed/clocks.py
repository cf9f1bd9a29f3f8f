"""Where the time of a rank's step goes: clocks on the engine's phases, on the banks and on every exchange."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from mooring import collectives
from mooring.train.engine import Engine

_EXCHANGES = (
    "all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "reduce_scatter",
    "reduce_scatter_tensor", "reduce_scatter_single",
)  # fmt: skip


class Clocks:
    """Seconds of this process's main thread by part, each moment in the innermost part only.

    Attributes:
        cpu: CPU time of the thread.
        wall: of the wall; in ``exchange`` it is what the thread waited for others.
    """

    def __init__(self) -> None:
        self.cpu: Counter[str] = Counter()
        self.wall: Counter[str] = Counter()
        self._parts = ["other"]
        self._last = time.thread_time(), time.perf_counter()

    def _pass(self) -> None:
        now = time.thread_time(), time.perf_counter()
        self.cpu[self._parts[-1]] += now[0] - self._last[0]
        self.wall[self._parts[-1]] += now[1] - self._last[1]
        self._last = now

    def phase(self, name: str) -> None:
        """The outermost part from now on."""
        self._pass()
        self._parts[0] = name

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        self._pass()
        self._parts.append(name)
        try:
            yield
        finally:
            self._pass()
            self._parts.pop()

    def around(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.within(name):
                return call(*args, **kwargs)

        return timed

    def on_exchanges(self) -> None:
        """From now on all exchanges of this process, and the waits for those that run in the background."""
        for name in _EXCHANGES:
            if hasattr(dist, name):
                setattr(dist, name, self._exchange(getattr(dist, name)))
        collectives._all_gather = self._exchange(collectives._all_gather)

    def _exchange(self, call: Callable[..., Any]) -> Callable[..., Any]:
        timed = self.around(call, "exchange")

        @functools.wraps(call)
        def waited(*args: Any, **kwargs: Any) -> Any:
            work = timed(*args, **kwargs)
            return None if work is None else _Work(work, self)

        return waited

    def on(self, engine: Engine) -> None:
        """The phases of this engine, and its method's banks."""
        entered, method = engine.health.phase.enter, engine.method

        def enter(name: str) -> None:
            self.phase({"step": "optimizer"}.get(name, name))
            entered(name)

        engine.health.phase.enter = enter  # type: ignore[method-assign]
        for name in ("before_step", "after_step"):
            setattr(method, name, self.around(getattr(method, name), "banks"))


class _Work:
    """An exchange in the background, whose wait is timed."""

    def __init__(self, work: Any, clocks: Clocks) -> None:
        self._work, self._clocks = work, clocks

    def wait(self, *args: Any) -> Any:
        with self._clocks.within("exchange"):
            return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
