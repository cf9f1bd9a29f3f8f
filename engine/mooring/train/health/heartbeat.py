"""What each rank is doing, written beside the run, and a report when one has done nothing else for too long."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mooring import signs
from mooring.exit_codes import HUNG
from mooring.parsing import parse_json
from mooring.regular_file import open_own, read_regular

FOLDER = "heartbeat"
_ANEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
_WRITE_EVERY = 10.0  # seconds
# Between the report of a hang and the end of the process, for the other ranks to report theirs: the first that
# ends closes their connections.
_LAST_WORDS = 10.0
# What may take long without a sign: compiling, reading weights, writing to a slow disk.
_SLOW_PHASES = ("start", "set-up", "checkpoint", "export")


class Phase:
    """Where the training is: a name, and a count that moves whenever something has happened.

    Setting it costs two assignments; no lock is needed, since one thread writes and the other only compares.

    Attributes:
        step: optimizer steps done.
        steps_begun: by this process; the first one compiles and allocates.
    """

    def __init__(self) -> None:
        self.name = "start"
        self.step = 0
        self.steps_begun = 0
        self.moves = 0

    @property
    def is_slow(self) -> bool:
        """Whether a long silence is no wonder."""
        return self.name in _SLOW_PHASES or self.steps_begun == 1

    def enter(self, name: str) -> None:
        """The training does something else now.

        One of: start, set-up, data, forward, backward, step, validation, export, checkpoint, test, ended.
        """
        self.name = name
        self.moves += 1

    def beat(self) -> None:
        """The same phase goes on, and something has happened in it."""
        self.moves += 1


class Heartbeat:
    """A thread that watches a ``Phase``.

    Args:
        phase: of this rank.
        run: the run folder: ``heartbeat/rank-R.json`` is kept there, a hang leaves ``heartbeat/hang-rank-R.txt``.
        rank: this process.
        hang_after: seconds without a move that are a hang; None: only the file is written.
        slow_after: the same in a phase that may take long; None: as ``hang_after``.
        abort: end the process after the report, with exit code ``HUNG``.
        on_hang: called once per hang with a sentence, from the watching thread.

    An agent on this machine (``mooring.launch.agent``) is told, too: one that is not heard any more is stopped, or
    holds the interpreter's lock for ever.
    """

    def __init__(
        self,
        phase: Phase,
        run: Path,
        rank: int,
        *,
        hang_after: float | None,
        slow_after: float | None = None,
        abort: bool = False,
        on_hang: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._phase, self._rank = phase, rank
        self._folder = run / FOLDER
        self._hang_after, self._abort, self._on_hang = hang_after, abort, on_hang
        self._slow_after = hang_after if slow_after is None else slow_after
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mooring-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write(0.0)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if error is None:
            self._phase.enter("ended")
        with contextlib.suppress(OSError):
            self._write(0.0, last=True)

    @property
    def _allowed(self) -> float | None:
        if self._hang_after is None or self._slow_after is None:
            return None
        return self._slow_after if self._phase.is_slow else self._hang_after

    def _watch(self) -> None:
        every = _WRITE_EVERY if self._hang_after is None else min(_WRITE_EVERY, self._hang_after / 4)
        moves, since, reported = self._phase.moves, time.monotonic(), False
        looked = since
        while not self._stop.wait(every):
            now = time.monotonic()
            # this very process did not run for a while (SIGSTOP, a suspended job): nobody hung
            slept, looked = now - looked > 3 * every + 5, now
            if self._phase.moves != moves or slept:
                moves, since, reported = self._phase.moves, now, False
            quiet, allowed = now - since, self._allowed
            with contextlib.suppress(OSError):  # a full disk is the training's to report
                self._write(quiet)
            if allowed is not None and quiet >= allowed and not reported:
                reported = True
                self._report(quiet)

    def _write(self, quiet: float, *, last: bool = False) -> None:
        """This rank's file, whole or not at all."""
        allowed = None if last or not self._abort else self._allowed
        signs.alive(self._rank, self._phase.name, self._phase.step, quiet, allowed)
        text = json.dumps(
            {
                "rank": self._rank,
                "host": platform.node(),
                "process": os.getpid(),
                "phase": self._phase.name,
                "step": self._phase.step,
                "seconds without a move": round(quiet, 1),
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
        )
        part = self._folder / f".rank-{self._rank}.part"
        with os.fdopen(open_own(part, _ANEW), "w", encoding="utf-8") as out:
            out.write(text + "\n")
        part.replace(self._folder / f"rank-{self._rank}.json")

    def _report(self, quiet: float) -> None:
        file = self._folder / f"hang-rank-{self._rank}.txt"
        told = "\n".join(f"  rank {rank}: {what}" for rank, what in ranks_at(self._folder.parent).items())
        with contextlib.suppress(OSError), os.fdopen(open_own(file, _ANEW), "w", encoding="utf-8") as out:
            out.write(
                f"rank {self._rank} has been in '{self._phase.name}' (step {self._phase.step}) for {quiet:.0f} s "
                f"without a move\n\nphase of each rank:\n{told}\n\nwhere the threads of rank {self._rank} are:\n"
            )
            out.flush()
            faulthandler.dump_traceback(out, all_threads=True)
        sentence = (
            f"rank {self._rank} hangs: nothing has moved for {quiet:.0f} s in '{self._phase.name}' of step "
            f"{self._phase.step}; phases of all ranks and stacks are in {file}"
        )
        with contextlib.suppress(Exception):  # a note that cannot be written must not keep a hang alive
            self._on_hang(sentence)
        if not self._abort:
            return
        signs.ended(HUNG, sentence, rank=self._rank)
        moves = self._phase.moves
        if self._stop.wait(min(_LAST_WORDS, quiet / 4)) or self._phase.moves != moves:
            return  # it went on, or ends by an error that another rank brought about
        print(f"{sentence}; the process ends itself", file=sys.stderr, flush=True)
        os._exit(HUNG)


def ranks_at(run: Path) -> dict[int, str]:
    """Rank -> phase, step and age of its last word, as the heartbeat files of a run tell."""
    found: dict[int, str] = {}
    for file in sorted((run / FOLDER).glob("rank-*.json")):
        try:
            told: dict[str, Any] = parse_json(read_regular(file))
            found[int(told["rank"])] = (
                f"'{told['phase']}', step {told['step']}, {told['seconds without a move']} s without a move at "
                f"{told['time']}, process {told['process']} on {told['host']}"
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being replaced, or of another version
    return found
