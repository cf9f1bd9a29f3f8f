"""Carries out a launch plan: one agent a command, here or over ssh, until all have ended or one has failed."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Self

from mooring.errors import MooringError
from mooring.exit_codes import LOST, PREEMPTED, USER_ERROR
from mooring.launch.plan import Command, LaunchPlan

_TAIL_LINES = 25


class LaunchError(MooringError):
    """A machine could not be reached, or the job failed on one; ``exit_code`` says how."""


class TakenDownError(LaunchError):
    """The launch itself was told to end (SIGTERM), and its job has saved itself."""

    exit_code = PREEMPTED


@dataclass(frozen=True, slots=True)
class Limits:
    """Every wait of a launch, in seconds.

    Attributes:
        connect: until a machine answers.
        heartbeat: between signs of life to every machine.
        silence: after which a machine ends its part by itself, and after which we give a machine up.
        settle: how long the other machines may go on after one has failed: their own errors say more.
        grace: between SIGTERM and SIGKILL.
        absent: for a lost machine to answer again, before the job is started again on it.
    """

    connect: float = 30.0
    heartbeat: float = 5.0
    silence: float = 60.0
    settle: float = 30.0
    grace: float = 30.0
    absent: float = 600.0


@dataclass(frozen=True, slots=True)
class Remote:
    """How another machine is reached.

    Attributes:
        ssh: the command and its options, before the host's name.
        python: the interpreter there.
        environment: set there before Python starts, where it must find its modules by it.
        srun: not by ssh, but as a step of the Slurm job that this process belongs to.
    """

    ssh: tuple[str, ...] = ("ssh",)
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)
    srun: bool = False

    def argv(self, command: Command, module: str = "mooring.launch.agent") -> list[str]:
        """Starts ``module`` where the command shall run. The words after the host's name are read by a shell."""
        start = [self.python, "-u", "-m", module]
        if command.host.is_here:
            return start
        settings = [f"{name}={value}" for name, value in sorted(self.environment.items())]
        if self.srun:
            return [
                *(
                    "srun",
                    "--overlap",
                    "--nodes=1",
                    "--ntasks=1",
                    "--ntasks-per-node=1",
                    "--unbuffered",
                    "--quiet",
                ),
                f"--nodelist={command.host.name}",
                *("env", *settings, *start),
            ]
        return [
            *self.ssh,
            *("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
            *("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"),
            command.host.name,
            shlex.join(["env", *settings, *start]),
        ]


@dataclass(slots=True)
class Part:
    """One command under way.

    Attributes:
        code: exit code once it has ended; negative: killed by that signal; None: it runs, or is lost.
        heard: ``time.monotonic()`` of its last message.
        tail: the last lines it wrote, for an error.
        clock: (time there, our time before we asked, our time after the answer), of the latest sign of life.
        ranks: where each rank on the machine was when it failed (``Overseer.told``).
        why: why the agent there ended the command.
    """

    command: Command
    process: subprocess.Popen[bytes]
    code: int | None = None
    lost: str | None = None
    heard: float = 0.0
    answered: bool = False
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))
    clock: tuple[float, float, float] | None = None
    ranks: list[dict[str, Any]] = field(default_factory=list)
    why: str = ""

    @property
    def over(self) -> bool:
        return self.code is not None or self.lost is not None

    @property
    def failed(self) -> bool:
        return self.lost is not None or bool(self.code)

    @property
    def exit_code(self) -> int:
        """As a shell has it."""
        if self.lost is not None:
            return LOST
        code = self.code or 0
        return code if code >= 0 else 128 - code


class Job:
    """All commands of a plan under way, as a context: on leaving it, nothing of them is left.

    Args:
        plan: what to run.
        remote: how other machines are reached.
        limits: all waits.
        cwd: the folder to run in, the same path everywhere.
        output: called with (command, text, 1 for stdout or 2 for stderr), in this thread, as it comes.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        *,
        remote: Remote,
        limits: Limits,
        cwd: str,
        output: Callable[[Command, str, int], None],
    ) -> None:
        self._limits, self._output = limits, output
        self._messages: queue.SimpleQueue[tuple[Part, dict[str, Any] | None]] = queue.SimpleQueue()
        self.parts: list[Part] = []
        self._least = len(plan.commands) if plan.least is None else plan.least
        self._missed: list[Part] = []
        self._interrupts: queue.SimpleQueue[int] = queue.SimpleQueue()
        try:
            for command in plan.commands:
                self.parts.append(self._started(command, remote, cwd))
        except OSError as err:
            self._end()
            raise LaunchError(f"{err.filename or remote.ssh[0]} cannot be started: {err.strerror}") from None
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _started(self, command: Command, remote: Remote, cwd: str) -> Part:
        process = subprocess.Popen(
            remote.argv(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C comes to us alone; we pass it on
        )
        part = Part(command, process, heard=time.monotonic())
        errors = threading.Thread(target=self._read_errors, args=(part, process.stderr), daemon=True)
        errors.start()
        threading.Thread(target=self._read_messages, args=(part, process.stdout, errors), daemon=True).start()
        self._send(
            part,
            {
                "argv": list(command.argv),
                "environment": dict(command.environment),
                "cwd": cwd,
                "silence": self._limits.silence,
                "grace": self._limits.grace,
            },
        )
        return part

    def signal(self, number: int) -> None:
        """Passes a signal on to every command, from any thread or signal handler."""
        self._interrupts.put(number)

    def wait(self) -> None:
        """Until every command has ended well, or as many as suffice.

        Raises:
            LaunchError: one failed; the others have been ended. It names the machine, and what it wrote last.
        """
        first: Part | None = None
        settle = beat = 0.0
        while not all(part.over for part in self.parts):
            now = time.monotonic()
            if now >= beat:
                self._signs_of_life()
                beat = now + self._limits.heartbeat
            self._give_up_the_silent(now)
            while not self._interrupts.empty():
                number = self._interrupts.get()
                for part in self.parts:
                    self._send(part, {"signal": number})
            if first is None and (first := self._fatal()):
                settle = now + self._limits.settle
            if first is not None and now >= settle:
                break
            try:
                part, message = self._messages.get(timeout=0.1)
            except queue.Empty:
                continue
            self._take(part, message)
        first = first or self._fatal()
        self._end()
        if first is not None:
            cause = self._cause(first)
            error = LaunchError(self._failure(cause))
            error.exit_code = cause.exit_code
            raise error

    def _fatal(self) -> Part | None:
        """The failed command without which the job does not go on."""
        failed = [part for part in self.parts if part.failed]
        if not failed:
            return None
        enough = len(self.parts) - len(failed) >= self._least and not self.parts[0].failed
        if not enough or any(part.exit_code == USER_ERROR for part in failed):
            return failed[0] if self.parts[0] not in failed else self.parts[0]
        for part in failed:
            if part not in self._missed:
                self._missed.append(part)
                self._output(part.command, f"{describe(part)}: the job goes on without it\n", 2)
        return None

    def _cause(self, first: Part) -> Part:
        """The command whose failure explains those of the others."""

        def distance(part: Part) -> tuple[int, bool, bool]:
            if part.exit_code == USER_ERROR:
                kind = 0
            elif part.why:
                kind = 1
            elif part.lost is not None:
                kind = 2
            else:
                kind = 4 if part.exit_code == LOST else 3
            # all ranks end by the mistake of one; they say so, and it is theirs in its own words
            told_by_another = any(_by_another_rank(told) for told in part.ranks)
            return kind, told_by_another, part is not first

        return min((part for part in self.parts if part.failed), key=distance, default=first)

    def _take(self, part: Part, message: dict[str, Any] | None) -> None:
        if message is None:  # its connection is closed
            if part.code is None and part.lost is None:
                part.lost = "the connection was closed" if part.answered else "it could not be started there"
            return
        part.heard = time.monotonic()
        part.answered = part.answered or "own" not in message
        if "out" in message:
            part.tail.extend(line for line in message["out"].splitlines() if line.strip())
            self._output(part.command, message["out"], message["to"])
        elif "ranks" in message:
            part.ranks, part.why = message["ranks"], message["why"]
        elif "here" in message:
            part.clock = (message["here"], message["asked"], time.time())
        elif "exit" in message:
            part.code = message["exit"]

    def _signs_of_life(self) -> None:
        for part in self.parts:
            self._send(part, {"asked": time.time()})

    def _give_up_the_silent(self, now: float) -> None:
        for part in self.parts:
            allowed = self._limits.silence if part.answered else self._limits.connect
            if not part.over and now - part.heard > allowed:
                part.lost = f"nothing was heard from it for {allowed:.0f} s"

    def _send(self, part: Part, message: dict[str, Any]) -> None:
        if part.over or part.process.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError, ValueError):  # its end is read from stdout
            # the pipe holds far more than is ever in it: this does not wait for a machine that is gone
            os.write(part.process.stdin.fileno(), (json.dumps(message) + "\n").encode())

    def _end(self) -> None:
        """Ends what runs: asked to, it has the grace time; then the connection is cut, and agents end by themselves."""
        for part in self.parts:
            self._send(part, {"stop": True})
        deadline = time.monotonic() + self._limits.grace + 12
        while time.monotonic() < deadline and not all(part.over for part in self.parts):
            try:
                self._take(*self._messages.get(timeout=0.1))
            except queue.Empty:
                continue
        for part in self.parts:
            if part.process.stdin is not None:
                part.process.stdin.close()
            try:
                part.process.wait(timeout=5 if part.code is not None else 0.1)
            except subprocess.TimeoutExpired:
                part.process.kill()  # ssh, or the agent; the far end hears nothing more and ends
                part.process.wait()

    def _read_messages(self, part: Part, pipe: IO[bytes], errors: threading.Thread) -> None:
        for line in pipe:
            try:
                message = json.loads(line)
            except ValueError:  # a login message of that machine
                message = {"out": line.decode("utf-8", "replace"), "to": 2, "own": False}
            if isinstance(message, dict):
                self._messages.put((part, message))
        errors.join(timeout=5)  # why it was closed is told there
        self._messages.put((part, None))

    def _read_errors(self, part: Part, pipe: IO[bytes]) -> None:
        for line in pipe:  # of ssh, or of Python before the agent runs
            self._messages.put((part, {"out": line.decode("utf-8", "replace"), "to": 2, "own": False}))

    def _failure(self, first: Part) -> str:
        lines = [describe(first)]
        if first.exit_code == USER_ERROR and any(told.get("text") for told in first.ranks):
            return lines[0]
        others = [part for part in self.parts if part is not first and part.failed]
        if others:
            lines.append("the others: " + "; ".join(describe(part) for part in others))
        elif len(self.parts) > 1:
            lines.append("the others were stopped")
        ranks = [f"  {_rank(part, told)}" for part in self.parts for told in part.ranks]
        if ranks:
            lines += ["where the ranks were:", *ranks]
        if first.tail:
            lines += [f"the last lines of {first.command.host.name}:", *(f"  {line}" for line in first.tail)]
        return "\n  ".join(lines)


def describe(part: Part) -> str:
    """``node1 (rank 2-3): exit code 1``."""
    name = f"{part.command.host.name} ({part.command.ranks_text})"
    mistakes = [told["text"] for told in part.ranks if told.get("code") == USER_ERROR and told["text"]]
    if part.why or mistakes:
        return f"{name}: {part.why or mistakes[0]}"
    if part.lost is not None:
        return f"{name}: {part.lost}"
    code = part.code or 0
    if code < 0:
        try:
            return f"{name}: ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"{name}: ended by signal {-code}"
    return f"{name}: exit code {code}"


def _rank(part: Part, told: Mapping[str, Any]) -> str:
    """``rank 1 on node1: in 'backward' of step 12, 301 s without a move; exit code 74: ...``."""
    said = []
    if "phase" in told:
        still = told["quiet"] + told["silent"]
        state = f" ({told['state']})" if told["silent"] > 15 and told["state"] else ""
        said.append(f"in '{told['phase']}' of step {told['step']}, {still:.0f} s without a move{state}")
    if "code" in told:
        last = f": {told['text'].splitlines()[0]}" if told["text"] else ""
        said.append(f"exit code {told['code']}{last}")
    return f"rank {told['rank']} on {part.command.host.name}: {'; '.join(said)}"


def _by_another_rank(told: Mapping[str, Any]) -> bool:
    return bool(re.match(r"rank \d+ stopped: ", told.get("text", "")))


def run_plan(
    plan: LaunchPlan,
    *,
    remote: Remote,
    limits: Limits | None = None,
    cwd: str,
    output: Callable[[Command, str, int], None],
) -> None:
    """Runs a plan to its end. Ctrl-C and SIGTERM are passed on to every rank; a second Ctrl-C ends the job.

    Raises:
        LaunchError: it failed on some machine.
        TakenDownError: SIGTERM came to this process, and the ranks have saved themselves.
        KeyboardInterrupt: it was interrupted.
    """
    interrupted: list[int] = []
    with Job(plan, remote=remote, limits=limits or Limits(), cwd=cwd, output=output) as job:

        def passed_on(number: int, _: object) -> None:
            if interrupted:
                raise KeyboardInterrupt
            interrupted.append(number)
            job.signal(number)

        before = {number: signal.signal(number, passed_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            job.wait()
        except LaunchError:
            if not interrupted:
                raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if interrupted and interrupted[0] == signal.SIGTERM:
        raise TakenDownError("told to end by SIGTERM; the job has ended, and what it saved can be continued")
    if interrupted:
        raise KeyboardInterrupt


def relay(hosts: Sequence[str]) -> Callable[[Command, str, int], None]:
    """Output for ``Job``: the first host's as it comes; that of the others line by line behind their name."""
    partial: dict[tuple[str, int], str] = {}

    def write(command: Command, text: str, to: int) -> None:
        stream = sys.stdout if to == 1 else sys.stderr
        name = command.host.name
        if name != hosts[0]:
            *lines, partial[name, to] = (partial.get((name, to), "") + text).split("\n")
            text = "".join(f"[{name}] {line}\n" for line in lines)
        stream.write(text)
        stream.flush()

    return write
