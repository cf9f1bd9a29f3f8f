"""What a launch asks Slurm for."""

from __future__ import annotations

from dataclasses import dataclass

FIRST = "@FIRST@"  # Rendezvous.address of a batch job: Slurm chooses the nodes


@dataclass(frozen=True, slots=True)
class Allocation:
    """What is asked of Slurm.

    Attributes:
        nodes: number of machines.
        processes: on each of them; one GPU each, unless ``gpus`` says otherwise.
        gpus: asked for by ``--gpus-per-node``; 0: none, a job on CPUs.
        options: further sbatch options, ``NAME=VALUE`` or ``NAME``, without the dashes.
        signal_before_end: seconds before the time limit at which SIGTERM comes, so that the run can save itself.
    """

    nodes: int
    processes: int
    gpus: int
    options: tuple[str, ...] = ()
    signal_before_end: int = 120
