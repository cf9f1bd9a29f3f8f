"""The same run as a Slurm batch job: a script that can be read, kept and changed, and its submission."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mooring.errors import ConfigError
from mooring.launch.allocation import FIRST, Allocation
from mooring.launch.hosts import Host
from mooring.launch.plan import Program, Rendezvous, torchrun_words
from mooring.launch.request import LaunchRequest
from mooring.launch.supervisor import LaunchError

_NODE = "@NODE@"
_OPTION = re.compile(r"[a-z][a-z-]*(=[^\s#]+)?")


def sbatch_script(
    program: Program,
    allocation: Allocation,
    rendezvous: Rendezvous,
    *,
    folder: Path,
    preflight: bool = True,
) -> str:
    """The batch script: torchrun on every node, which meet on the first.

    Args:
        program: what every rank runs.
        allocation: what is asked of Slurm.
        rendezvous: its address is ``FIRST``.
        folder: where the job runs and its log goes; shared by all nodes.
        preflight: ask all nodes of the job before anything is trained (``mooring preflight --slurm``).

    Raises:
        ConfigError: an option that is none.
    """
    for option in allocation.options:
        if not _OPTION.fullmatch(option):
            raise ConfigError(
                f"--sbatch: expected an option as in partition=gpu or exclusive, got {option!r}"
            )
    given = {option.partition("=")[0] for option in allocation.options}
    asked = {
        "job-name": rendezvous.job,
        "nodes": str(allocation.nodes),
        "ntasks-per-node": "1",
        "output": f"{rendezvous.job}-%j.log",
        "signal": f"TERM@{allocation.signal_before_end}",
    }
    if allocation.gpus:
        asked["gpus-per-node"] = str(allocation.gpus)
    lines = [f"#SBATCH --{name}={value}" for name, value in asked.items() if name not in given]
    lines += [f"#SBATCH --{option}" for option in allocation.options]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sorted(program.environment.items())]
    # the two words that only the job knows stay open for its shell; all others are quoted
    words = torchrun_words(rendezvous, allocation.nodes, allocation.processes, node=_NODE)
    torchrun = [
        shlex.quote(word).replace(_NODE, '"$SLURM_NODEID"').replace(FIRST, '"$first"') for word in words
    ]
    run = " ".join([shlex.quote(program.python), *torchrun, "-m", program.module])
    quoted = [shlex.quote(word) for word in program.words]
    check = []
    if preflight:
        asked_words = (
            *(
                "preflight",
                "--slurm",
                f"--processes={allocation.processes}",
                f"--master-port={rendezvous.port}",
            ),
            *(word for word in program.words[1:] if not word.startswith("resume=")),
        )
        check = [
            "",
            "# asks every node, and tries a small all-reduce: what is wrong where ends the job before it trains",
            shlex.join([program.python, "-m", program.module, *asked_words]),
        ]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "",
            "set -euo pipefail",
            f"cd {shlex.quote(str(folder))}",
            # not `| head -n 1`: head leaves first, and pipefail makes an error of the writer's broken pipe
            'nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            "export first=${nodes%%$'\\n'*}",
            *exports,
            *check,
            "",
            "# one torchrun on every node; $SLURM_NODEID differs from node to node, so a shell there reads it",
            "# shellcheck disable=SC2016",
            "srun --kill-on-bad-exit=1 bash -c " + shlex.quote(f'exec {run} "$@"') + " torchrun \\",
            " \\\n".join(f"    {word}" for word in quoted),
            "",
        ]
    )


@dataclass(frozen=True, slots=True)
class Script:
    """A batch script and where it lies, or would lie."""

    path: Path
    text: str


def write_script(
    request: LaunchRequest, *, folder: Path, preflight: bool = True, dry_run: bool = False
) -> Script:
    """The batch script of a launch, written to ``folder/JOB.sbatch`` unless ``dry_run``.

    Raises:
        LaunchError: there is another file of that name.
    """
    assert request.allocation is not None
    text = sbatch_script(
        request.program, request.allocation, request.rendezvous, folder=folder, preflight=preflight
    )
    script = Script(folder / f"{request.rendezvous.job}.sbatch", text)
    if dry_run:
        return script
    if script.path.exists() and script.path.read_text(encoding="utf-8") != text:
        raise LaunchError(f"{script.path} is another script already: remove it, or choose another out=")
    script.path.write_text(text, encoding="utf-8")
    return script


def allocated_hosts(processes: int, environment: Mapping[str, str] = os.environ) -> tuple[Host, ...]:
    """The nodes of the Slurm job that this process belongs to, the first of them first.

    Raises:
        LaunchError: it belongs to none.
    """
    nodes = environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise LaunchError(
            "--slurm: expected to run inside a Slurm job (sbatch, salloc), got no SLURM_JOB_NODELIST"
        )
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as err:
        raise LaunchError(f"scontrol could not tell the nodes of {nodes}: {err}") from None
    return tuple(Host(name, processes) for name in done.stdout.split())


def submit(script: Path) -> str:
    """Gives the script to ``sbatch``; returns the job's number.

    Raises:
        LaunchError: there is no Slurm here, or it refuses.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)], capture_output=True, text=True, timeout=60, check=False
        )
    except FileNotFoundError:
        raise LaunchError(
            f"sbatch was not found: this machine is no Slurm login node; the script is {script}"
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(
            "sbatch did not answer within 60 s; ask  squeue --me  whether the job is there"
        ) from None
    if done.returncode != 0:
        raise LaunchError(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
