"""Ranks: what each process knows and how they agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import RankFailure, RankPool, rank_pool

from mooring.distributed import Ranks, init_from_environment, launched_ranks
from mooring.errors import DistributedError
from mooring.exit_codes import CRASHED, USER_ERROR


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


@pytest.mark.parametrize(("kind", "code"), [("mistake", USER_ERROR), ("crash", CRASHED)])
def test_a_problem_of_one_ends_all_with_its_exit_code(two_ranks: RankPool, kind: str, code: int) -> None:
    (first, first_code), (second, second_code) = two_ranks.run("ranks_cases:a_problem_of_one", kind=kind)
    assert first.startswith("DistributedError: rank 1 stopped: ") and first.endswith(second)
    assert first_code == second_code == code


def test_an_exchange_with_a_rank_that_is_gone_is_known_as_such(tmp_path: Path) -> None:
    said = tmp_path / "said"
    with rank_pool(2) as pool, pytest.raises(RankFailure, match="the process ended"):
        pool.run("ranks_cases:one_goes", meeting=str(said))
    assert said.read_text().startswith("True "), said.read_text()


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
