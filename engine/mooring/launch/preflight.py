"""Asks every host of a launch what it has, and tries a small all-reduce, before anything is trained."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from mooring.launch.attempts import remote_of
from mooring.launch.facts import Facts, Request
from mooring.launch.findings import Answer, Finding, findings, overview
from mooring.launch.hosts import Host
from mooring.launch.plan import Command, LaunchPlan
from mooring.launch.request import LaunchRequest
from mooring.launch.supervisor import Job, LaunchError, Limits, Part, Remote, describe, run_plan

COLLECTIVE_SECONDS = 60.0
# Logs and one checkpoint of a model of average size; what a run really takes is looked at by the run itself.
NEED_BYTES = 2e9


@dataclass(frozen=True, slots=True)
class Preflight:
    """The result: every host's answer, what is wrong, and how the all-reduce went.

    Attributes:
        collective: ``{"world", "backend", "gigabytes_per_second"}``; None: it was not tried, or failed.
        collective_problem: why it failed; empty otherwise.
    """

    answers: tuple[Answer, ...]
    found: tuple[Finding, ...]
    collective: dict[str, object] | None = None
    collective_problem: str = ""

    @property
    def ready(self) -> bool:
        return not self.collective_problem and not any(finding.fatal for finding in self.found)

    def require_ready(self) -> None:
        """
        Raises:
            LaunchError: something stands against a start.
        """
        if not self.ready:
            count = sum(finding.fatal for finding in self.found) + bool(self.collective_problem)
            raise LaunchError(
                f"the hosts are not ready: {count} of the lines above must be put right; "
                "--no-preflight starts without looking"
            )

    def tables(self) -> list[Table]:
        """What is wrong where, then what all hosts have in common."""
        shown = []
        rows = [
            (f.host, f.check, f.got, f.expected, f.advice, "red" if f.fatal else "yellow") for f in self.found
        ]
        if self.collective_problem:
            rows.append(
                ("all", "all-reduce", self.collective_problem, "equal sums on all ranks",
                 "a firewall between the hosts? the right network: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME", "red")
            )  # fmt: skip
        if rows:
            table = Table("host", "check", "found", "expected", "what to do", title="not as it should be")
            for *cells, colour in rows:
                table.add_row(*map(escape, cells), style=colour)
            shown.append(table)
        common = dict(overview(self.answers, self.found))
        if self.collective is not None:
            rate = self.collective["gigabytes_per_second"]
            common["all-reduce"] = (
                f"{self.collective['world']} processes by {self.collective['backend']}, {rate:.2f} GB/s a link"
            )
        table = Table("check", "every host", title="ready" if self.ready else "in order")
        for check, text in common.items():
            table.add_row(escape(check), escape(text))
        shown.append(table)
        return shown


def check(request: LaunchRequest, *, data: Path, out: Path, files: Sequence[Path], cwd: Path) -> Preflight:
    """The check before a launch, with its hosts, launcher and environment.

    Args:
        request: the launch.
        data, out, files: as the run's settings name them.
        cwd: the folder that it runs in.
    """
    program = replace(request.program, module="mooring.launch.allreduce", words=(f"{COLLECTIVE_SECONDS:g}",))
    # one all-reduce, without restarts
    once = replace(request, rendezvous=replace(request.rendezvous, restarts=0))
    return preflight(
        request.hosts,
        request.questions(data, out, files),
        collective=lambda: once.plan(program),
        remote=remote_of(request),
        limits=Limits(settle=10, grace=5),
        cwd=str(cwd),
        python=request.program.python,
        environment=dict(request.environment),
        need_bytes=NEED_BYTES,
    )


def preflight(
    hosts: Sequence[Host],
    request: Request,
    *,
    collective: Callable[[], LaunchPlan],
    remote: Remote,
    limits: Limits,
    cwd: str,
    python: str,
    environment: dict[str, str],
    need_bytes: float,
) -> Preflight:
    """Asks all hosts at once, then tries the all-reduce where nothing stands against it.

    Args:
        hosts: the one that runs rank 0 first.
        request: what to ask; ``first`` and ``visitors`` are filled in here.
        collective: the plan of the all-reduce.
        remote, limits, cwd: as for ``Job``.
        python, environment: of the training.
        need_bytes: free disk space that the run needs.

    Bounded by ``limits.connect`` + 2 ``request.seconds`` for the questions and as much again for the all-reduce.
    """
    answers = _ask(hosts, request, remote, limits, cwd, python, environment)
    found = findings(answers, need_bytes=need_bytes, port=request.port)
    result = Preflight(tuple(answers), tuple(found))
    if not result.ready:
        return result
    written: list[str] = []
    try:
        run_plan(
            collective(),
            remote=remote,
            limits=limits,
            cwd=cwd,
            output=lambda _, text, to: written.append(text) if to == 1 else None,
        )
    except LaunchError as err:
        return replace(result, collective_problem=str(err))
    for line in "".join(written).splitlines():
        _, begin, rest = line.partition('{"world"')  # pdsh puts the host's name before it
        if begin:
            return replace(result, collective=json.loads(begin + rest))
    return replace(result, collective_problem="it ended without a result")


def _ask(
    hosts: Sequence[Host],
    request: Request,
    remote: Remote,
    limits: Limits,
    cwd: str,
    python: str,
    environment: dict[str, str],
) -> list[Answer]:
    commands = []
    for place, host in enumerate(hosts):
        asked = replace(request, first=place == 0, visitors=len(hosts) - 1)
        argv = (python, "-m", "mooring.launch.facts", json.dumps(asdict(asked)))
        commands.append(Command(host, range(place, place + 1), argv, environment))
    written: dict[str, list[str]] = {host.name: [] for host in hosts}

    def keep(command: Command, text: str, to: int) -> None:
        if to == 1:
            written[command.host.name].append(text)

    plan = LaunchPlan("questions", tuple(commands), len(hosts))
    # one that cannot be reached must not keep the others from answering
    patient = replace(limits, settle=limits.connect + 2 * request.seconds)
    with Job(plan, remote=remote, limits=patient, cwd=cwd, output=keep) as job:
        with contextlib.suppress(LaunchError):  # each host's own problem is told by its answer
            job.wait()
        parts = list(job.parts)
    return [_answer(part, "".join(written[part.command.host.name])) for part in parts]


def _answer(part: Part, text: str) -> Answer:
    host = part.command.host
    line = next((line for line in text.splitlines() if line.startswith('{"name"')), None)
    if line is None:
        why = part.tail[-1] if part.tail else describe(part).partition(": ")[2]
        return Answer(host, None, problem=why)
    clock = None
    if part.clock is not None:
        there, asked, answered = part.clock
        clock = there - (asked + answered) / 2, (answered - asked) / 2
    return Answer(host, Facts.from_json(line), clock=clock)
