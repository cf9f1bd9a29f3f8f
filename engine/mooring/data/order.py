"""Which rows make up which batch: a pure function of (seed, epoch, rank, position)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mooring.data.draws import permutation
from mooring.errors import DataError


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One batch to make.

    Attributes:
        epoch, position: where in the run it lies.
        rows: [B] int64 positions in the split; -1 is a padding row.
    """

    epoch: int
    position: int
    rows: np.ndarray


class EpochOrder:
    """The batches of every epoch on one rank.

    All ranks share one order; batch t of rank r is rows ``(t * world + r) * B`` and on of it, so that the batches of
    all ranks, one after the other, are a single process's batch of world times the size. ``interleaved``, batch t
    of rank r is every world-th row from ``t * world * B + r`` on: the same holds for any part of a batch. Training
    shuffles anew each epoch and by default leaves out the incomplete last batch (BatchNorm would see the
    padding); evaluation keeps the listing order and pads with -1. Either way each rank has the same number
    of batches.

    Args:
        count: rows of the split.
        batch_size: rows per batch and rank.
        seed: of the shuffles.
        shuffle: whether to shuffle.
        drop_last: leave out the incomplete last batch instead of padding it.
        rank, world: this process and how many there are.
        interleaved: deal the rows out one by one.

    Raises:
        DataError: a number is out of range, or no full batch can be made.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        rank: int = 0,
        world: int = 1,
        interleaved: bool = False,
    ) -> None:
        if batch_size < 1 or world < 1 or not 0 <= rank < world:
            raise DataError(
                f"expected batch_size >= 1 and 0 <= rank < world; got batch_size {batch_size}, rank {rank}, "
                f"world {world}"
            )
        if count < 1:
            raise DataError("expected at least one image; got none")
        step = batch_size * world
        if drop_last and count < step:
            processes = f" x {world} processes" if world > 1 else ""
            raise DataError(
                f"expected at least one full batch; got {count} images for batch size {batch_size}{processes}"
                f": lower train.batch_size to at most {max(1, count // world) * world}"
            )
        self.count, self.batch_size = count, batch_size
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.rank, self.world, self.interleaved = rank, world, interleaved
        self._batches = count // step if drop_last else -(-count // step)

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self._batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[BatchRequest]:
        """The batches of one epoch from position ``start`` on."""
        rows = permutation(self.seed, epoch, self.count) if self.shuffle else np.arange(self.count)
        for position in range(start, self._batches):
            if self.interleaved:
                start_of_all = position * self.world * self.batch_size
                mine = rows[start_of_all + self.rank :: self.world][: self.batch_size]
            else:
                first = (position * self.world + self.rank) * self.batch_size
                mine = rows[first : first + self.batch_size]
            padding = np.full(self.batch_size - len(mine), -1)
            yield BatchRequest(epoch, position, np.concatenate([mine, padding]).astype(np.int64))

    def onward(self, epoch: int, start: int, *, endless: bool) -> Iterator[BatchRequest]:
        """The batches from a place on: to the end of the epoch, or through all later epochs."""
        yield from self.epoch(epoch, start)
        while endless:
            epoch += 1
            yield from self.epoch(epoch)
