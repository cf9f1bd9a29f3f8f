"""One run folder on several machines: which ranks see the same one, and files that travel between those that do not."""

from __future__ import annotations

import os
import secrets
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist

from mooring.distributed import Ranks
from mooring.errors import RunFolderError
from mooring.regular_file import open_own, open_regular

_PIECE = 64 << 20  # bytes in one exchange
_ANEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def keepers(folder: Path, ranks: Ranks) -> tuple[int, ...]:
    """For each rank the first rank that sees the same folder: the one that keeps it. All zeros: it is shared.

    Every rank leaves a file there for a moment, whose name no cache of a network file system has seen before.

    Args:
        folder: made where it is not there.
        ranks: all of them call this.

    Raises:
        RunFolderError: a rank cannot write there; on that rank, and ``DistributedError`` on the others.
    """
    if ranks.world == 1:
        return (0,)
    word = ranks.broadcast(secrets.token_hex(8))

    def mark(rank: int) -> Path:
        return folder / f".seen-{word}-{rank}"

    problem: Exception | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark(ranks.rank).touch()
    except OSError as err:
        problem = RunFolderError(
            f"out: expected a folder that can be written on every machine, got {folder} on {os.uname().nodename}: "
            f"{err.strerror}; choose another out="
        )
    try:
        ranks.agree(problem)
        mine = next(rank for rank in range(ranks.world) if mark(rank).is_file())
        return tuple(ranks.gather(mine))  # nobody removes a mark before all have looked
    finally:
        with suppress(OSError):
            mark(ranks.rank).unlink(missing_ok=True)


def send_file(file: Path, size: int, ranks: Ranks, *, source: int, here: bool) -> None:
    """A file of one rank, written where it is wanted; every rank calls it.

    Args:
        file: the same path everywhere; its folder exists where it is wanted.
        size: bytes.
        ranks: as for all collectives.
        source: the rank that has it.
        here: write it on this rank.

    Raises:
        RunFolderError: it could not be read or written; on every rank.
    """
    part = file.with_name(f".{file.name}.part")
    writes = here and ranks.rank != source
    problem: Exception | None = None
    read: BinaryIO | None = None
    write: BinaryIO | None = None
    with ExitStack() as opened:
        try:
            if ranks.rank == source:
                read = opened.enter_context(open_regular(file))
            if writes:
                write = opened.enter_context(os.fdopen(open_own(part, _ANEW), "wb"))
        except OSError as err:
            problem = _refused(file, err)
        ranks.agree(problem)
        for begin in range(0, size, _PIECE):
            length = min(_PIECE, size - begin)
            piece = torch.zeros(length, dtype=torch.uint8)
            try:
                if read is not None:  # one that became shorter is found by its checksum
                    content = bytearray(read.read(length).ljust(length, b"\0"))
                    piece = torch.frombuffer(content, dtype=torch.uint8)
            except OSError as err:
                problem = problem or _refused(file, err)
            dist.broadcast(piece, src=source, group=ranks.group)
            try:
                if write is not None:
                    write.write(piece.numpy().tobytes())
            except OSError as err:
                problem = problem or _refused(file, err)
    ranks.agree(problem)
    if writes:
        part.replace(file)


def _refused(file: Path, err: OSError) -> RunFolderError:
    return RunFolderError(
        f"{file} could not be brought to every machine ({err.strerror} on {os.uname().nodename}): free space, or give "
        "every rank the machine that it had"
    )
