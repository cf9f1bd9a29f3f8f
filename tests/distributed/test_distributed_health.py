"""Ranks that no longer agree: one has a fault, one holds another bank."""

from __future__ import annotations

from ranks import RankPool


def test_every_rank_takes_the_branch_of_the_one_with_the_fault(two_ranks: RankPool) -> None:
    assert two_ranks.run("health_cases:a_fault_on_one_rank") == [[False, True, True]] * 2


def test_a_bank_that_went_its_own_way_is_named_on_every_rank(two_ranks: RankPool) -> None:
    for raised, message in two_ranks.run("health_cases:banks"):
        assert raised
        assert message.startswith("step 20: bank bank must hold the same rows") and "ranks [1]" in message
