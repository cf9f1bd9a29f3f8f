from __future__ import annotations

from collections.abc import Iterator

import pytest
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
