"""Several ranks compute what one process computes from the same global batches: methods, backends, banks, padding.

What always runs meets every method, every stage and every way to share a bank; the whole table is ``make test-full``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equality import BATCH_STATISTICS, MANY_CLASSES, STAGES, alone, both, check_equal, classes_of, deepspeed
from method_cases import SETTINGS, make_method
from ranks import RankPool


def equal_to_one_process(pool: RankPool, method: str, kind: str, backend: str = "ddp", **case: Any) -> Any:
    """The ranks' results, after comparing them with those of one process."""
    results, alone = both(pool, method, kind, backend, **case)
    check_equal(results, alone)
    return results


def case_mark(*, always: bool) -> Any:
    return () if always else pytest.mark.slow


def test_methods_with_batch_statistics_are_known() -> None:
    assert (
        tuple(m for m in sorted(SETTINGS) if make_method(m).requirements.batchnorm == "train")
        == BATCH_STATISTICS
    )


@pytest.mark.parametrize(
    "method, kind",
    [
        # the cheap network for all, the one with BatchNorm for those that use its statistics
        pytest.param(m, k, marks=case_mark(always=(k == "cnn") == (m in BATCH_STATISTICS)))
        for m in sorted(SETTINGS)
        for k in ("vit", "cnn")
    ],
)
def test_two_ranks_equal_one_process(two_ranks: RankPool, method: str, kind: str) -> None:
    equal_to_one_process(two_ranks, method, kind)


def always_at(method: str) -> int:
    """The stage at which a method always runs: the one where its parameters are divided, if it reads any by value."""
    reads = ("dr_tune", "l2_sp", "feature_map", "delta", "bi_tuning", "concept_tuning", "tes", "core_tuning")
    return 3 if method in reads else sorted(SETTINGS).index(method) % 4


@pytest.mark.parametrize(
    "method, stage, kind",
    [
        pytest.param(
            m, s, k, marks=case_mark(always=s == always_at(m) and k == "vit" and m != "concept_tuning")
        )
        for m in sorted(SETTINGS)
        for s in STAGES
        for k in ("vit", "cnn")
    ],
)
def test_deepspeed_equals_one_process(two_ranks: RankPool, method: str, stage: int, kind: str) -> None:
    equal_to_one_process(two_ranks, method, kind, classes=classes_of(method), **deepspeed(stage))


@pytest.mark.parametrize("scope", ["gathered", "sharded"])
@pytest.mark.parametrize("settings", [{"backend": "ddp"}, deepspeed(3)], ids=["ddp", "zero3"])
def test_a_shared_bank_is_that_of_one_process(
    two_ranks: RankPool, scope: str, settings: dict[str, Any]
) -> None:
    """K is no multiple of the global batch, so that rows fall out in the middle of one; two micro-batches."""
    case = {"bank_size": 40, "classes": MANY_CLASSES, "micros": 2, "steps": 4, "rotation_period": 2}
    results = equal_to_one_process(two_ranks, "dr_tune", "vit", bank_scope=scope, **case, **settings)
    banks = [result["bank"] for result in results]
    # of each rank, 2 micro-batches of 8 rows: two vectors of 192 numbers, label and id
    assert results[0]["bytes"]["bank rows"] == 2 * 8 * (2 * 192 * 4 + 16)
    single = alone("dr_tune", "vit", bank_scope=scope, **case)["bank"]
    if scope == "gathered":
        assert all(torch.equal(bank["ids"], single["ids"]) for bank in banks)
        assert torch.equal(banks[0]["fingerprint"], banks[1]["fingerprint"])
    else:
        # slot s lies on rank s modulo 2
        assert all(len(bank["ids"]) == 20 for bank in banks)
        assert torch.equal(torch.stack([bank["ids"] for bank in banks], 1).flatten(), single["ids"])


def test_a_private_bank_holds_a_ranks_own_rows(two_ranks: RankPool) -> None:
    found = two_ranks.run(
        "equality_cases:train", method="dr_tune", backend="ddp", bank_scope="private", bank_size=8
    )
    first, second = (set(result["bank"]["ids"].tolist()) for result in found)
    assert not first & second
    assert all("bank rows" not in result["bytes"] for result in found)


@pytest.mark.parametrize("method", ["dr_tune", "tes", "core_tuning", "bss"])
def test_unequal_valid_rows_are_weighted(two_ranks: RankPool, method: str) -> None:
    """The last five rows of each global batch are padding: all on rank 1."""
    equal_to_one_process(two_ranks, method, "vit", padded=5)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_unequal_valid_rows_are_weighted_in_every_method(two_ranks: RankPool, method: str) -> None:
    equal_to_one_process(two_ranks, method, "vit", padded=5)


@pytest.mark.parametrize("backend", [{"backend": "ddp"}, *(deepspeed(stage) for stage in STAGES)], ids=str)
def test_accumulation_and_clipping(two_ranks: RankPool, backend: dict[str, Any]) -> None:
    equal_to_one_process(two_ranks, "fine_tune", "vit", micros=2, clip=0.5, **backend)


@pytest.mark.parametrize("stage", [pytest.param(s, marks=case_mark(always=s == 2)) for s in STAGES])
def test_adamw(two_ranks: RankPool, stage: int) -> None:
    equal_to_one_process(two_ranks, "lp_ft", "vit", optimizer="adamw", **deepspeed(stage))


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, settings",
    [
        (1, {"offload_optimizer": True}),
        (2, {"offload_optimizer": True}),
        (3, {"offload_optimizer": True}),
        (3, {"offload_optimizer": True, "offload_parameters": True}),
    ],
)
def test_offloading(two_ranks: RankPool, stage: int, settings: dict[str, Any]) -> None:
    equal_to_one_process(two_ranks, "dr_tune", "vit", **deepspeed(stage, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "cnn"])
@pytest.mark.parametrize("stage", ["ddp", *STAGES])
@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_four_ranks_equal_one_process(four_ranks: RankPool, method: str, stage: str | int, kind: str) -> None:
    chosen = {"backend": "ddp"} if isinstance(stage, str) else deepspeed(stage)
    equal_to_one_process(four_ranks, method, kind, classes=classes_of(method), **chosen)
