from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# the pool of ranks
sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))

from ranks import RankPool, rank_pool


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    """Two gloo ranks for all cases of a test file."""
    with rank_pool(2) as pool:
        yield pool
