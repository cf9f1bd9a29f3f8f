"""The processes of a run: which one this is, and how they agree on small things."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mooring.errors import DistributedError, RanksLostError
from mooring.exit_codes import CRASHED
from mooring.traffic import TRAFFIC

_T = TypeVar("_T")
# A rank that waits longer than this for another one gives up: the other one hangs, or its link is cut.
DEFAULT_TIMEOUT = timedelta(minutes=30)
_GLOO_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "No route to host",
    "Timed out waiting",
    "gloo/transport",
)


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process among those that train together; alone, every call does nothing and returns at once.

    All calls but the attributes are collective: every rank makes the same ones in the same order. They wait for
    the other ranks, so they belong between steps, not inside one.

    Attributes:
        rank: this process, 0 to world - 1, in the order of the nodes.
        world: number of processes.
        local_rank: this process among those of its node; chooses the device.
        group: the process group that the calls go through; None: the default one.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None

    @classmethod
    def here(cls) -> Ranks:
        """The ranks of the default process group; a single process where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        rank = dist.get_rank()
        return cls(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))

    def apart(self) -> Ranks:
        """The same processes with a group of their own, so that another thread can make its calls beside this one's."""
        return self if self.world == 1 else replace(self, group=dist.new_group(backend="gloo"))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the run folder and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        if self.world > 1:
            # a sum on the CPU, not dist.barrier: that one would occupy a GPU where the group has one
            dist.all_reduce(torch.zeros(1), group=self.group)

    def gather(self, obj: _T) -> list[_T]:
        """Every rank's object, by rank, on every rank. Small objects of plain types."""
        if self.world == 1:
            return [obj]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, obj, group=self.group)
        return found

    def broadcast(self, obj: _T) -> _T:
        """Rank 0's object on every rank."""
        if self.world == 1:
            return obj
        box: list[Any] = [obj]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank; the same answer on all."""
        if self.world == 1:
            return flag
        return bool(self.all_reduce_(torch.tensor([int(flag)])).item())

    def agree(self, problem: Exception | None) -> None:
        """Raises on every rank where at least one brings a problem: its own, or what the first such rank said.

        Raises:
            Exception: this rank's problem.
            DistributedError: another rank's, in words, with the exit code that it has there.
        """
        said = self.gather(
            None
            if problem is None
            else (f"{type(problem).__name__}: {problem}", getattr(problem, "exit_code", CRASHED))
        )
        if problem is not None:
            raise problem
        for rank, theirs in enumerate(said):
            if theirs is not None:
                error = DistributedError(f"rank {rank} stopped: {theirs[0]}")
                error.exit_code = theirs[1]
                raise error

    def on_first(self, function: Callable[[], _T]) -> _T:
        """What the function returns on rank 0, on every rank; no other rank calls it.

        Raises:
            Exception: what it raised, on rank 0.
            DistributedError: the same in words, elsewhere.
        """
        result: list[_T] = []
        problem: Exception | None = None
        if self.is_first:
            try:
                result.append(function())
            except Exception as err:
                problem = err
        self.agree(problem)
        return self.broadcast(result[0] if result else None)  # type: ignore[return-value]

    def node_by_node(self, function: Callable[[], _T]) -> _T:
        """What the function returns here; the first rank of each node runs it before the others begin.

        For what leaves a file behind that the others then find.
        """
        if self.world == 1:
            return function()
        result: list[_T] = []
        for turn in (True, False):
            problem: Exception | None = None
            if (self.local_rank == 0) == turn:
                try:
                    result.append(function())
                except Exception as err:
                    problem = err
            self.agree(problem)
        return result[0]

    def all_reduce_(
        self, tensor: Tensor, op: Literal["sum", "max", "min"] = "sum", purpose: str = "agreement"
    ) -> Tensor:
        """Replaces the tensor by its sum (maximum, minimum) over the ranks, in place, and returns it.

        Args:
            tensor: contiguous, the same shape and dtype on every rank, on the CPU or the rank's own device;
                with a device tensor nothing waits on the host.
            op: how ranks are combined.
            purpose: what the bytes are counted under.
        """
        if self.world > 1:
            TRAFFIC.count(tensor, purpose, self.world)
            kinds = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
            dist.all_reduce(tensor, op=kinds[op], group=self.group)
        return tensor


# This process alone, whatever group it may belong to.
ALONE = Ranks()


def launched_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """What the launcher (torchrun, DeepSpeed) says about this process; a single one where it says nothing.

    Raises:
        DistributedError: it contradicts itself, or says half of it.
    """
    if "WORLD_SIZE" not in environment:
        return Ranks()
    numbers: dict[str, int] = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        text = environment.get(
            name, environment["RANK"] if name == "LOCAL_RANK" and "RANK" in environment else ""
        )
        if not text.isdecimal():
            raise DistributedError(
                f"the environment has WORLD_SIZE={environment['WORLD_SIZE']!r} and {name}={text!r}, expected whole "
                "numbers: start the run with torchrun or deepspeed, or unset both"
            )
        numbers[name] = int(text)
    if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise DistributedError(
            f"RANK={numbers['RANK']} is none of the {numbers['WORLD_SIZE']} ranks that WORLD_SIZE tells of"
        )
    if numbers["WORLD_SIZE"] > 1 and not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
        raise DistributedError(
            f"WORLD_SIZE={numbers['WORLD_SIZE']}, but MASTER_ADDR and MASTER_PORT do not say where rank 0 listens: "
            "start the run with torchrun or deepspeed"
        )
    return Ranks(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"])


def init_from_environment(*, timeout: timedelta = DEFAULT_TIMEOUT) -> Ranks:
    """Joins the process group that the launcher describes; does nothing for a process on its own, or a second time.

    The group runs gloo for CPU tensors and, where there are GPUs, NCCL for theirs; it is left when the process ends.

    Args:
        timeout: how long a rank waits for another one in any exchange.

    Raises:
        DistributedError: the environment is contradictory, or a rank has no GPU of its own.
        RanksLostError: the others were not reached.
    """
    if dist.is_initialized():
        return Ranks.here()
    ranks = launched_ranks()
    if ranks.world == 1:
        return ranks
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if ranks.local_rank >= torch.cuda.device_count():
            raise DistributedError(
                f"rank {ranks.rank} is number {ranks.local_rank} on its node, which has {torch.cuda.device_count()} "
                "GPUs: start one process per GPU"
            )
        torch.cuda.set_device(ranks.local_rank)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world, timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError) as err:
        raise RanksLostError(
            f"rank {ranks.rank} of {ranks.world} could not join the others at {address} within "
            f"{timeout.total_seconds():.0f} s: {err}"
        ) from err
    atexit.register(_leave)
    return ranks


def is_lost_rank(err: BaseException) -> bool:
    """Whether an exchange failed because another rank is gone, or was not heard in time."""
    if isinstance(err, dist.DistError):
        return True
    # gloo has no class of its own for it
    return isinstance(err, RuntimeError) and any(word in str(err) for word in _GLOO_LOST)


def init_alone() -> None:
    """A process group of this process alone, for libraries that want one; does nothing where there is a group."""
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
