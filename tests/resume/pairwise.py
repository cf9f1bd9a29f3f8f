"""A small set of cases in which every two values of any two axes meet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def covering(axes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Cases that cover all pairs, the same ones at every call: greedily the case that covers most of what is left.

    Args:
        axes: values of each axis, the longest axis first keeps the set small.
    """
    wanted = {
        (i, a, j, b) for i, j in combinations(range(len(axes)), 2) for a, b in product(axes[i], axes[j])
    }
    chosen = []
    while wanted:
        best = max(product(*axes), key=lambda case: len(pairs(case) & wanted))
        chosen.append(best)
        wanted -= pairs(best)
    return chosen


def pairs(case: tuple[Any, ...]) -> set[tuple[int, Any, int, Any]]:
    """The pairs of values that meet in a case."""
    return {(i, case[i], j, case[j]) for i, j in combinations(range(len(case)), 2)}
