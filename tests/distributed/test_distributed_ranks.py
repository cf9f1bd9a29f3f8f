"""Ranks: what each process knows and how they agree."""

from __future__ import annotations

import pytest
import torch
from ranks import RankFailure, RankPool, rank_pool

from mooring.distributed import Ranks, init_from_environment, launched_ranks
from mooring.errors import DistributedError


def test_a_process_on_its_own_talks_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = init_from_environment()
    assert ranks == Ranks.here() == Ranks(0, 1, 0)
    tensor = torch.tensor([2.0])
    ranks.barrier()
    assert ranks.is_first and ranks.gather("a") == ["a"] and ranks.broadcast("b") == "b"
    assert ranks.any(True) and not ranks.any(False)
    assert ranks.all_reduce_(tensor) is tensor and tensor.item() == 2.0
    assert not torch.distributed.is_initialized()


def test_two_ranks_agree(two_ranks: RankPool) -> None:
    found = two_ranks.run("ranks_cases:everything")
    for rank, each in enumerate(found):
        assert each["ranks"] == (rank, 2, rank) and each["again"]
        assert each["first"] == (rank == 0)
        assert each["gathered"] == [{"rank": 0, "text": "x"}, {"rank": 1, "text": "x" * 1001}]
        assert each["broadcast"] == {"from": 0}
        assert each["any of one"] and not each["any of none"]
        assert each["sum"].tolist() == [3.0, 1.0]
        assert each["max"].tolist() == [1, 0]
        assert each["min"].tolist() == [0, -1]


def test_a_failing_rank_is_reported_and_ends_the_pool() -> None:
    with rank_pool(2) as pool, pytest.raises(RankFailure, match="planted"):
        pool.run("ranks_cases:one_fails")


@pytest.mark.parametrize(
    "environment, says",
    [
        ({"WORLD_SIZE": "2"}, "RANK=''"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "none of the 2 ranks"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR"),
    ],
)
def test_a_half_told_environment_is_refused(environment: dict[str, str], says: str) -> None:
    with pytest.raises(DistributedError, match=says):
        launched_ranks(environment)


def test_the_launchers_environment_is_read() -> None:
    environment = {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert launched_ranks(environment) == Ranks(5, 8, 1)
    assert launched_ranks({}) == Ranks()
