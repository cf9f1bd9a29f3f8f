"""Runs a launch, and starts it again from its newest checkpoint where it failed and that was asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from mooring.exit_codes import LOST, USER_ERROR, would_come_again
from mooring.launch.plan import Command, LaunchPlan
from mooring.launch.request import LaunchRequest
from mooring.launch.supervisor import LaunchError, Limits, Remote, TakenDownError, relay, run_plan

_BETWEEN_LOOKS = 2.0  # seconds
# Of the environment: what a bare login on another machine needs to find the same modules.
_FOR_PYTHON = ("PYTHONPATH", "LD_LIBRARY_PATH")


def remote_of(request: LaunchRequest) -> Remote:
    """How the hosts of a launch are reached."""
    environment = {name: value for name, value in request.environment.items() if name in _FOR_PYTHON}
    return Remote(environment=environment, srun=request.in_slurm)


def run_with_restarts(
    request: LaunchRequest,
    *,
    cwd: Path,
    out: Path,
    warn: Callable[[str], None],
    limits: Limits | None = None,
) -> None:
    """Runs the launch until it ends well, or has failed once more often than ``request.restarts``.

    What the user must put right is not tried again (``mooring.exit_codes``): wrong settings or data, a refused resume,
    a full disk. A crash, a lost machine, a hang and a preemption are.

    Args:
        request: what to run.
        cwd: the folder to run in, on every machine.
        out: the run folder, for the error.
        warn: told about every failure that is followed by a restart.
        limits: all waits.

    Raises:
        LaunchError: it failed for good; with the exit code of its cause.
        TakenDownError, KeyboardInterrupt: it was told to end; that is never followed by a restart.
    """
    attempt = 0
    while True:
        try:
            run_plan(
                request.plan(),
                remote=remote_of(request),
                limits=limits,
                cwd=str(cwd),
                output=relay([host.name for host in request.hosts]),
            )
            return
        except LaunchError as err:
            for_good = isinstance(err, TakenDownError) or would_come_again(err.exit_code)
            if for_good or attempt >= request.restarts:
                kept = f"what was saved is in {out}: the same command with resume=auto out={out} goes on from there"
                if err.exit_code == USER_ERROR:
                    kept = f"put it right, and start again; what {out} may hold already is continued by resume=auto"
                err.args = (f"{err}\n{kept}",)
                raise
            attempt += 1
            if err.exit_code == LOST:
                _wait_for_the_hosts(request, limits or Limits(), cwd)
            warn(f"{err}\nstarting again from the newest checkpoint, restart {attempt} of {request.restarts}")
            request = request.again()


def _wait_for_the_hosts(request: LaunchRequest, limits: Limits, cwd: Path) -> None:
    """Until every host answers again, or for as long as is allowed; a machine that lost its power takes minutes.

    Raises:
        KeyboardInterrupt, TakenDownError: it was told to end.
    """
    commands = tuple(
        Command(host, range(place, place + 1), (request.program.python, "-c", "pass"))
        for place, host in enumerate(request.hosts)
    )
    deadline = time.monotonic() + limits.absent
    while request.is_remote:
        try:
            run_plan(
                LaunchPlan("a sign of life", commands, len(commands)),
                remote=remote_of(request),
                limits=limits,
                cwd=str(cwd),
                output=lambda *said: None,
            )
            return
        except TakenDownError:
            raise
        except LaunchError:
            if time.monotonic() > deadline:
                return  # the start itself tells what is missing
            time.sleep(_BETWEEN_LOOKS)
