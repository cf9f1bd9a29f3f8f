"""Runs one command on one machine for a supervisor elsewhere; started there by ssh, or here directly.

Talks in JSON lines. On stdin: first the job ``{"argv", "environment", "cwd", "silence", "grace"}``, then
``{"signal": N}``, ``{"stop": true}``, or ``{"asked": time}`` as a sign of life. On stdout: ``{"out": text,
"to": 1 | 2}``, ``{"here": time, "asked": time}`` in answer to each sign of life, where it failed
``{"ranks": [...], "why": text}`` (``Overseer.told``; why it was ended from here), and last ``{"exit": code}``
(negative: the signal).

A rank that is stopped, or says nothing any more, ends the command; so does one that failed by what a user must put
right, where the launcher in between would start it again.

Nothing outlives it: when the supervisor says stop, closes the connection, or is silent for ``silence``
seconds (its machine is gone, or the link), every descendant of the command is told to end by SIGTERM, and
``grace`` seconds later by SIGKILL. It is their subreaper, so that those whose parent died are found too.

Standard library only: it starts in a few hundredths of a second, and its environment stays small.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

from mooring.launch.overseer import Overseer, Verdict
from mooring.launch.parent_death import adopt_orphans, ended_with_its_parent

_KILLED_WITHIN = 10.0  # seconds; a process that waits for a dead disk cannot be killed at all
_TURN = 0.05  # seconds between looks at the command, which tells its end to nobody who waits on a pipe
_LOOK = 1.0  # seconds between looks at the signs of its ranks


class Agent:
    """One command and its descendants.

    Args:
        job: as in the module's description.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._writing = threading.Lock()
        self._silence, self._grace = float(job["silence"]), float(job["grace"])
        self._overseer = Overseer()
        adopt_orphans()
        try:
            self._process = subprocess.Popen(
                job["argv"],
                env=os.environ | job["environment"] | self._overseer.environment,
                cwd=job["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=partial(_in_the_child, ended_with_its_parent()),
            )
        except OSError as err:
            self._overseer.close()
            self.say({"out": f"{err.filename or job['argv'][0]}: {err.strerror}\n", "to": 2})
            raise
        self._readers = [
            threading.Thread(target=self._relay, args=(pipe, to), daemon=True)
            for pipe, to in ((self._process.stdout, 1), (self._process.stderr, 2))
        ]
        for reader in self._readers:
            reader.start()

    def say(self, message: dict[str, Any]) -> None:
        """Writes one line; a supervisor that is gone is noticed by what it no longer sends."""
        with self._writing, contextlib.suppress(BrokenPipeError, ValueError):
            sys.stdout.write(json.dumps(message) + "\n")
            sys.stdout.flush()

    def run(self) -> int:
        """Serves the supervisor until the command and all its descendants have ended; returns its exit code."""
        heard = looked = time.monotonic()
        verdict: Verdict | None = None
        with selectors.DefaultSelector() as waiting:
            waiting.register(sys.stdin.fileno(), selectors.EVENT_READ)
            pending = b""
            while self._process.poll() is None:
                stop = time.monotonic() - heard > self._silence
                if waiting.select(_TURN):
                    received = os.read(sys.stdin.fileno(), 65536)
                    heard, stop = time.monotonic(), not received
                    *lines, pending = (pending + received).split(b"\n")
                    stop = any(self._told(json.loads(line)) for line in lines if line.strip()) or stop
                if time.monotonic() - looked > _LOOK:
                    looked, verdict = time.monotonic(), self._overseer.verdict()
                if stop or verdict is not None:
                    break
        ended = self._process.poll()
        if ended is None:  # where its ranks were, before they are ended
            self.say({"ranks": self._overseer.told(), "why": verdict.text if verdict is not None else ""})
        self._end_all()
        code = self._process.poll()
        for reader in self._readers:
            reader.join(timeout=5)
        if ended:
            self.say({"ranks": self._overseer.told(), "why": ""})
        code = -signal.SIGKILL if code is None else code
        code = self._overseer.exit_code(code) if verdict is None else verdict.code
        self._overseer.close()
        return code

    def _told(self, message: dict[str, Any]) -> bool:
        """Does what the supervisor asks; True: stop."""
        if "signal" in message:
            self._process.send_signal(int(message["signal"]))
        elif "asked" in message:
            self.say({"here": time.time(), "asked": message["asked"]})
        return bool(message.get("stop"))

    def _end_all(self) -> None:
        """SIGTERM to the command, which knows its workers best; SIGKILL to whoever is left after the grace time."""
        deadline = time.monotonic() + self._grace
        if self._process.poll() is None:
            self._process.terminate()
            # one that was stopped by SIGSTOP hears SIGTERM only when it goes on
            self._process.send_signal(signal.SIGCONT)
        while self._alive() and time.monotonic() < deadline:
            if self._process.poll() is not None:
                for pid in self._alive():  # workers whose launcher has gone
                    _kill(pid, signal.SIGTERM)
                    _kill(pid, signal.SIGCONT)
            time.sleep(_TURN)
        deadline = time.monotonic() + _KILLED_WITHIN
        while (alive := self._alive()) and time.monotonic() < deadline:
            for pid in alive:
                _kill(pid, signal.SIGKILL)
            time.sleep(_TURN)
        if alive:
            self.say(
                {"out": f"still there after SIGKILL (waiting for a disk?): processes {alive}\n", "to": 2}
            )

    def _alive(self) -> list[int]:
        """Descendants of this process that have not ended; dead orphans are buried on the way."""
        self._process.poll()
        found = descendants(os.getpid())
        for pid in found:
            if pid != self._process.pid:
                with contextlib.suppress(ChildProcessError):  # not a child of ours yet: its parent lives
                    os.waitpid(pid, os.WNOHANG)
        return [pid for pid in descendants(os.getpid()) if _state(pid) not in ("Z", "X", "")]

    def _relay(self, pipe: IO[bytes], to: int) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while chunk := os.read(pipe.fileno(), 65536):
            if text := decoder.decode(chunk):
                self.say({"out": text, "to": to})


def descendants(pid: int) -> list[int]:
    """Process ids of the children of ``pid``, their children, and so on."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            parents[int(entry.name)] = int(fields[1])
    found, front = [], [pid]
    while front:
        parent = front.pop()
        children = [child for child, its_parent in parents.items() if its_parent == parent]
        found += children
        front += children
    return found


def _stat(pid: int) -> list[str]:
    """State, parent and the rest of /proc/PID/stat; empty where the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name before it may hold anything


def _state(pid: int) -> str:
    return next(iter(_stat(pid)), "")


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _in_the_child(end_with_the_agent: Callable[[], None]) -> None:
    """Between fork and exec of the command."""
    end_with_the_agent()
    for number in (signal.SIGINT, signal.SIGHUP):  # what is ignored stays ignored across exec
        signal.signal(number, signal.SIG_DFL)


def main() -> int:
    # the terminal's Ctrl-C reaches the whole foreground group; what it means is the supervisor's to say
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # ssh is gone: stdin tells it too
    job = json.loads(_first_line())
    try:
        agent = Agent(job)
    except OSError:
        print(json.dumps({"exit": 127}), flush=True)
        return 127
    code = agent.run()
    agent.say({"exit": code})
    return 0


def _first_line() -> bytes:
    """Read byte by byte: what follows the job stays in the pipe for the selector."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(sys.stdin.fileno(), 1)):
        line += byte
    return line


if __name__ == "__main__":
    sys.exit(main())
