"""The plan of a launch: which command, with which environment, on which machine.

Pure: nothing here opens a connection, starts a process or reads a clock. Commands are lists of words and
are never put together into a line that a shell would read; where another program does that (pdsh), the
words travel encoded (``words``).
"""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mooring.errors import ConfigError
from mooring.launch.hosts import Host, same_slots
from mooring.launch.words import encode_words

PORT = 29500
# What training processes read from the environment; of these, what is set here is set on every node.
_TRAVELS = re.compile(
    r"(NCCL|GLOO|TORCH|TORCHINDUCTOR|PYTORCH|CUDA|UCX|FI|OMP|MKL|DS|MOORING|HF|TRITON)_\w+"
    r"|PYTHONPATH|PYTHONUNBUFFERED|LD_LIBRARY_PATH"
)
# Of the job that this process may itself be part of, of one machine's devices, or nobody's business elsewhere.
_STAYS = re.compile(
    r"TORCHELASTIC_\w+|CUDA_VISIBLE_DEVICES|MOORING_DEBUG|MOORING_SIGNS|\w*(TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY)\w*"
)


@dataclass(frozen=True, slots=True)
class Command:
    """What is started on one machine.

    Attributes:
        host: the machine.
        ranks: the ranks it runs, the last one excluded; with an elastic rendezvous what they are at full size.
        argv: the command.
        environment: added to the environment that the machine's login gives.
    """

    host: Host
    ranks: range
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks_text(self) -> str:
        first, last = self.ranks.start, self.ranks.stop - 1
        return f"rank {first}" if first == last else f"ranks {first}-{last}"


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """All commands of one launch; ``commands[0]`` runs rank 0.

    Attributes:
        kind: for people.
        commands: one or more a machine.
        world_size: number of processes.
        least: commands that suffice to go on where others fail, the first one among them; None: all.
    """

    kind: str
    commands: tuple[Command, ...]
    world_size: int
    least: int | None = None

    def text(self) -> str:
        """The plan as lines that can be pasted into a shell, one block a machine."""
        hosts = len({command.host.name for command in self.commands})
        blocks = [f"# {self.kind}: {self.world_size} processes on {hosts} host{'s' * (hosts > 1)}"]
        for command in self.commands:
            settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(command.environment.items())]
            blocks.append(
                f"# {command.host.name}: {command.ranks_text}\n{' '.join([*settings, shlex.join(command.argv)])}"
            )
        return "\n\n".join(blocks)


@dataclass(frozen=True, slots=True)
class Program:
    """The program to run as every rank: ``python -m module words...``.

    Attributes:
        python: the interpreter, the same path on every machine.
        module: run with ``-m``.
        words: its arguments.
        environment: set for every process, on every machine.
    """

    python: str
    module: str
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the processes meet.

    Attributes:
        address: of the machine that runs rank 0, as the other machines reach it.
        port: free on that machine.
        backend: "static": every node is there from the beginning; "c10d": nodes may come, fail and come again.
        min_nodes: with "c10d", the number of nodes that suffices to go on; None: all.
        restarts: how often the processes are started again after a failure, by torchrun itself.
        job: name of the job; two jobs at one address and port must differ in it.
    """

    address: str
    port: int = PORT
    backend: Literal["static", "c10d"] = "static"
    min_nodes: int | None = None
    restarts: int = 0
    job: str = "mooring"


def travelling(environment: Mapping[str, str], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """The part of this environment that training processes on other machines need, with ``given`` over it."""
    kept = {
        name: value
        for name, value in environment.items()
        if _TRAVELS.fullmatch(name) and not _STAYS.fullmatch(name)
    }
    return kept | dict(given or {})


def local_plan(program: Program, processes: int, *, port: int = PORT) -> LaunchPlan:
    """``processes`` ranks on this machine, without any launcher in between."""
    host = Host("localhost", processes)
    commands = tuple(
        Command(
            host,
            range(rank, rank + 1),
            _alone(program),
            {**program.environment, **_rank_environment(rank, rank, processes, processes, "127.0.0.1", port)},
        )
        for rank in range(processes)
    )
    return LaunchPlan("local processes", commands, processes)


def deepspeed_plan(program: Program, hosts: Sequence[Host], rendezvous: Rendezvous) -> LaunchPlan:
    """DeepSpeed's node launcher on every host, which starts one process a slot.

    Raises:
        ConfigError: an elastic rendezvous is asked for.
    """
    if rendezvous.backend != "static" or rendezvous.min_nodes is not None or rendezvous.restarts:
        raise ConfigError(
            "the DeepSpeed launcher has no elastic rendezvous: add --torchrun for --rendezvous c10d"
        )
    world = {host.name: list(range(host.slots)) for host in hosts}
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    return _one_a_host(
        "DeepSpeed launcher",
        program,
        hosts,
        lambda node: (
            program.python, "-u", "-m", "deepspeed.launcher.launch",
            f"--world_info={encoded}",
            f"--node_rank={node}",
            f"--master_addr={rendezvous.address}",
            f"--master_port={rendezvous.port}",
            "--no_local_rank", "--module", program.module, *program.words,
        ),
    )  # fmt: skip


def torchrun_plan(program: Program, hosts: Sequence[Host], rendezvous: Rendezvous) -> LaunchPlan:
    """``torchrun`` on every host.

    Raises:
        ConfigError: the hosts have different slots, or the rendezvous contradicts itself.
    """
    slots = same_slots(hosts, needed_for="torchrun")
    plan = _one_a_host(
        f"torchrun, {rendezvous.backend} rendezvous",
        program,
        hosts,
        lambda node: (
            program.python,
            *torchrun_words(rendezvous, len(hosts), slots, node=str(node)),
            f"--local-addr={hosts[node].name}",
            "-m", program.module, *program.words,
        ),
    )  # fmt: skip
    return replace(plan, least=rendezvous.min_nodes)


def torchrun_words(rendezvous: Rendezvous, nodes: int, slots: int, *, node: str) -> tuple[str, ...]:
    """``-m torch.distributed.run`` and its options for one node.

    Raises:
        ConfigError: the rendezvous contradicts itself.
    """
    meeting = f"{rendezvous.address}:{rendezvous.port}"
    common = (
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={slots}",
        f"--max-restarts={rendezvous.restarts}",
    )
    if rendezvous.backend == "static":
        if rendezvous.min_nodes not in (None, nodes):
            raise ConfigError(
                f"--nodes: a static rendezvous waits for all {nodes} nodes; got a minimum of "
                f"{rendezvous.min_nodes}: add --rendezvous c10d"
            )
        return (
            *common,
            f"--nnodes={nodes}",
            f"--node-rank={node}",
            f"--master-addr={rendezvous.address}",
            f"--master-port={rendezvous.port}",
        )
    least = nodes if rendezvous.min_nodes is None else rendezvous.min_nodes
    if not 1 <= least <= nodes:
        raise ConfigError(f"--nodes: expected a minimum from 1 to {nodes}, the number of hosts; got {least}")
    # who holds the store is known by number; torchrun itself would compare host names
    holds = (f"--rdzv-conf=is_host={int(node == '0')}",) if node.isdigit() else ()
    return (
        *common,
        f"--nnodes={least}:{nodes}" if least < nodes else f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meeting}",
        f"--rdzv-id={rendezvous.job}",
        *holds,
    )


def pdsh_plan(program: Program, hostfile: str, hosts: Sequence[Host], rendezvous: Rendezvous) -> LaunchPlan:
    """DeepSpeed's own runner, which reaches the hosts by pdsh; one command, on this machine.

    pdsh gives the command to a shell on every host, so the words travel as one that no shell changes.
    DeepSpeed ends a job with ``pkill -f`` on every host when it is interrupted: two jobs of one user on the
    same machines should not be started this way.
    """
    argv = (
        program.python, "-m", "deepspeed.launcher.runner",
        f"--hostfile={hostfile}",
        "--launcher=pdsh",
        "--force_multi",
        f"--master_addr={rendezvous.address}",
        f"--master_port={rendezvous.port}",
        "--no_local_rank", "--module", "mooring.launch.words", encode_words((program.module, *program.words)),
    )  # fmt: skip
    world = sum(host.slots for host in hosts)
    here = Host("localhost", world)
    return LaunchPlan(
        "DeepSpeed runner over pdsh", (Command(here, range(world), argv, program.environment),), world
    )


def _one_a_host(
    kind: str, program: Program, hosts: Sequence[Host], argv: Callable[[int], tuple[str, ...]]
) -> LaunchPlan:
    commands, first = [], 0
    for node, host in enumerate(hosts):
        commands.append(Command(host, range(first, first + host.slots), argv(node), program.environment))
        first += host.slots
    return LaunchPlan(kind, tuple(commands), first)


def _alone(program: Program) -> tuple[str, ...]:
    return (program.python, "-u", "-m", program.module, *program.words)


def _rank_environment(
    rank: int, local_rank: int, world: int, local_world: int, address: str, port: int
) -> dict[str, str]:
    """What ``torch.distributed`` reads with ``init_method="env://"``."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(local_world),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
