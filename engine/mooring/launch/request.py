"""What a user asks of ``mooring launch``, checked, and the plan that follows from it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mooring.errors import ConfigError
from mooring.launch.allocation import FIRST, Allocation
from mooring.launch.facts import Request
from mooring.launch.hosts import Host, read_hostfile
from mooring.launch.plan import (
    PORT,
    LaunchPlan,
    Program,
    Rendezvous,
    deepspeed_plan,
    local_plan,
    pdsh_plan,
    torchrun_plan,
    travelling,
)

Launcher = Literal["local", "deepspeed", "pdsh", "torchrun", "slurm"]
_NAME = re.compile(r"[A-Za-z_]\w*")
_JOB = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """One launch.

    Attributes:
        launcher: what starts the processes.
        hosts: where; of a Slurm job none, as Slurm chooses them.
        words: of the program: ``train``, the recipe and the settings.
        rendezvous: where the processes meet.
        environment: for every process.
        hostfile: as given, for pdsh.
        allocation: of a Slurm job.
        restarts: how often a failed job is started again.
        in_slurm: this process belongs to a Slurm job, whose nodes the hosts are.
    """

    launcher: Launcher
    hosts: tuple[Host, ...]
    words: tuple[str, ...]
    rendezvous: Rendezvous
    environment: Mapping[str, str] = field(default_factory=dict)
    hostfile: Path | None = None
    allocation: Allocation | None = None
    restarts: int = 0
    in_slurm: bool = False

    @property
    def program(self) -> Program:
        return Program(sys.executable, "mooring.cli", self.words, self.environment)

    @property
    def is_remote(self) -> bool:
        return any(not host.is_here for host in self.hosts)

    def plan(self, program: Program | None = None) -> LaunchPlan:
        """The commands that start ``program`` (default: the training) as this launch does."""
        program = program or self.program
        match self.launcher:
            case "local":
                return local_plan(program, self.hosts[0].slots, port=self.rendezvous.port)
            case "torchrun":
                return torchrun_plan(program, self.hosts, self.rendezvous)
            case "pdsh":
                assert self.hostfile is not None
                return pdsh_plan(program, str(self.hostfile), self.hosts, self.rendezvous)
            case _:
                return deepspeed_plan(program, self.hosts, self.rendezvous)

    def again(self) -> LaunchRequest:
        """The same launch, continuing the run that it began."""
        words = [word for word in self.words if not word.startswith("resume=")]
        return replace(self, words=(*words, "resume=auto"))

    def questions(self, data: Path, out: Path, files: Sequence[Path]) -> Request:
        """What the hosts are asked before."""
        return Request(
            data=str(data.expanduser().absolute()),
            files=tuple(str(file.expanduser().absolute()) for file in files),
            out=str(out.expanduser().absolute()),
            address=self.rendezvous.address,
            port=self.rendezvous.port,
            first=False,
            visitors=0,
        )


def launch_request(
    words: Sequence[str],
    *,
    name: str,
    hostfile: Path | None = None,
    processes: int | None = None,
    nodes: str | None = None,
    torchrun: bool = False,
    slurm: bool = False,
    pdsh: bool = False,
    rendezvous: Literal["static", "c10d"] = "static",
    restarts: int = 0,
    master_addr: str | None = None,
    master_port: int = PORT,
    gpus_per_node: int | None = None,
    env: Sequence[str] = (),
    sbatch: Sequence[str] = (),
    allocated: Sequence[Host] = (),
) -> LaunchRequest:
    """Checks the options of ``mooring launch`` against each other.

    Args:
        words: of the program, ``train`` first.
        name: of the job.
        allocated: the nodes of the Slurm job that this process belongs to.
        others: the options, named as on the command line.

    Raises:
        ConfigError: all that contradicts itself, or a hostfile that cannot be read.
    """
    problems = []
    if slurm + torchrun + pdsh > 1 and not (slurm and torchrun):
        problems.append("--torchrun, --pdsh and --slurm: take one; the batch script runs torchrun anyway")
    if slurm and hostfile is not None:
        problems.append("--hostfile: got one with --slurm, which chooses the machines itself; leave one out")
    if pdsh and hostfile is None:
        problems.append("--pdsh: needs --hostfile")
    if not slurm and (sbatch or gpus_per_node is not None):
        problems.append("--sbatch and --gpus-per-node: belong to --slurm")
    if rendezvous == "c10d" and not (torchrun or slurm):
        problems.append("--rendezvous c10d: belongs to --torchrun or --slurm")
    if hostfile is not None and processes is not None:
        problems.append("--processes: got one with --hostfile, which says how many slots each host has")
    environment = dict(_settings(env, problems))
    low, high = _range(nodes, problems)
    if slurm and nodes is None:
        problems.append("--nodes: got nothing; say how many machines to ask Slurm for")
    if problems:
        raise ConfigError("\n  ".join(["the launch cannot be planned:", *problems]))

    hosts: tuple[Host, ...] = read_hostfile(hostfile) if hostfile is not None else tuple(allocated)
    if not hosts and not slurm:
        hosts = (Host("localhost", processes or 1),)
    if hosts and high is not None and high != len(hosts):
        raise ConfigError(
            f"--nodes: got {nodes} for {len(hosts)} hosts; the larger number is that of the hosts"
        )
    first = hosts[0].name if hosts else ""
    meeting = Rendezvous(
        address=FIRST if slurm else master_addr or ("127.0.0.1" if first == "localhost" else first),
        port=master_port,
        backend=rendezvous,
        min_nodes=low if low != high else None,
        restarts=restarts if rendezvous == "c10d" else 0,
        job=_JOB.sub("-", name).strip("-") or "mooring",
    )
    if meeting.restarts or slurm:  # the same words are started again
        words = [*(word for word in words if not word.startswith("resume=")), "resume=auto"]
    launcher: Launcher = (
        "slurm"
        if slurm
        else "pdsh"
        if pdsh
        else "torchrun"
        if torchrun
        else "deepspeed"
        if hostfile
        else "local"
    )
    allocation = None
    if slurm:
        per_node = processes or gpus_per_node or 1
        allocation = Allocation(
            nodes=high or 1,
            processes=per_node,
            gpus=per_node if gpus_per_node is None else gpus_per_node,
            options=tuple(sbatch),
        )
    return LaunchRequest(
        launcher=launcher,
        hosts=hosts,
        words=tuple(words),
        rendezvous=meeting,
        environment=travelling(os.environ, environment),
        hostfile=hostfile,
        allocation=allocation,
        restarts=0 if meeting.restarts else restarts,
        in_slurm=bool(allocated),
    )


def _settings(given: Sequence[str], problems: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for setting in given:
        name, equals, value = setting.partition("=")
        if not equals or not _NAME.fullmatch(name):
            problems.append(f"--env: expected NAME=VALUE, got {setting!r}")
        pairs.append((name, value))
    return pairs


def _range(text: str | None, problems: list[str]) -> tuple[int | None, int | None]:
    """``4`` or ``2:4`` as (least, most)."""
    if text is None:
        return None, None
    parts = text.split(":")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        problems.append(f"--nodes: expected a number, or MIN:MAX, got {text!r}")
        return None, None
    low, high = int(parts[0]), int(parts[-1])
    if not 1 <= low <= high:
        problems.append(f"--nodes: expected 1 <= MIN <= MAX, got {text!r}")
    return low, high
