"""Batches that all ranks have, or none: what one of them cannot read stops the others at the same place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from mooring.distributed import Ranks
from mooring.errors import DataError

_T = TypeVar("_T")


def agreed(items: Iterable[_T], ranks: Ranks) -> Iterator[_T]:
    """The items, each once every rank has its own.

    Args:
        items: as many on every rank.
        ranks: who takes part; one small exchange for each item.

    Raises:
        DataError: on every rank, with ``everywhere`` set, where at least one could not read its next item: there with
            its own words, elsewhere with that rank's.
    """
    if ranks.world == 1:
        yield from items
        return
    source = iter(items)
    while True:
        problem: DataError | None = None
        item: list[_T] = []
        try:
            item = [next(source)]
        except StopIteration:
            pass
        except DataError as err:
            problem = err
        if ranks.any(problem is not None):
            said = ranks.gather(None if problem is None else str(problem))
            if problem is None:
                rank, text = next((r, t) for r, t in enumerate(said) if t is not None)
                problem = DataError(f"rank {rank}: {text}")
            problem.everywhere = True
            raise problem
        if not item:
            return
        yield item[0]
