"""Gloo ranks on this machine, started once and used for many cases: a process start costs seconds, a case far less."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any


class RankFailure(AssertionError):
    """At least one rank raised; the message holds every rank's traceback."""


class RankPool:
    """``world`` processes that run functions of test modules side by side, in one process group."""

    def __init__(self, world: int, path: list[str]) -> None:
        self.world = world
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, port, there, path), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: str, /, *, seconds: float = 560, **arguments: Any) -> list[Any]:
        """``module:function(**arguments)`` on every rank; the results by rank.

        Raises:
            RankFailure: a rank raised, died, or gave no answer in ``seconds``; the pool is of no more use then.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        end = time.monotonic() + seconds
        answers: list[tuple[bool, Any]] = [(False, "no answer")] * self.world
        waiting = dict(zip(self._pipes, range(self.world), strict=True))
        while waiting and (ready := wait(list(waiting), max(0.0, end - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = False, "the process ended"
                if not answers[rank][0]:
                    end = min(end, time.monotonic() + 3)  # the others may wait for this one for ever
        if all(good for good, _ in answers):
            return [result for _, result in answers]
        if any(good or text == "no answer" for good, text in answers):
            self.close()  # the ranks are out of step
        raise RankFailure(
            f"{function}({arguments})\n"
            + "\n".join(f"rank {rank}: {text}" for rank, (good, text) in enumerate(answers) if not good)
        )

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # a rank that waits for work ends
        for process in self._processes:
            process.join(3)
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def rank_pool(world: int) -> Iterator[RankPool]:
    pool = RankPool(world, sys.path)
    try:
        yield pool
    finally:
        pool.close()


def _serve(rank: int, world: int, port: int, pipe: Connection, path: list[str]) -> None:
    sys.path[:] = path
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from mooring.distributed import init_from_environment

    init_from_environment()
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        module, name = function.split(":")
        try:
            answer = True, getattr(importlib.import_module(module), name)(**arguments)
        except BaseException:  # whatever it is, the test has to see it
            answer = False, traceback.format_exc()
        pipe.send(answer)
