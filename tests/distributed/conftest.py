from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# the small encoders and batches of the method tests
sys.path.insert(0, str(Path(__file__).parent.parent / "methods"))
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks count exchanges by torch's dispatcher too

from ranks import RankPool, rank_pool


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    """Two gloo ranks for all cases of a test file."""
    with rank_pool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with rank_pool(4) as pool:
        yield pool
