"""Several ranks compute what one process computes from the same global batches: methods, backends, banks, padding.

What always runs meets every method, every stage and every way to share a bank; the whole table is ``make test-full``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from equality_cases import train
from method_cases import SETTINGS, make_method
from ranks import RankPool

# Sums of rows in another order round otherwise: some 1e-7 relative in a loss, which the steps then build on. Batch
# statistics of few values make each step many times as sensitive to the one before.
FIRST_LOSS = {"rtol": 2e-6, "atol": 1e-6}
LATER_LOSS = {"rtol": 1e-4, "atol": 1e-5}
MOVEMENT = 0.01  # of how far training moved a tensor; a factor that is wrong for a rank is at least 1 / 16
STAGES = (0, 1, 2, 3)
# At ZeRO-3 a head of so many classes is really divided, and so is everything else (see make_backend).
MANY_CLASSES = 120
BATCH_STATISTICS = ("concept_tuning", "daft", "stoch_norm")


@cache
def _alone(case: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return train(**dict(case))


def equal_to_one_process(pool: RankPool, method: str, kind: str, backend: str = "ddp", **case: Any) -> Any:
    """The ranks' results, after comparing them with those of one process."""
    settings = case.pop("backend_settings", None)
    # rounding grows fast through batch statistics of few values
    case.setdefault("steps", 2 if kind == "cnn" and method in BATCH_STATISTICS else 3)
    alone = _alone(tuple({"method": method, "kind": kind, **case}.items()))
    results = pool.run(
        "equality_cases:train", method=method, kind=kind, backend=backend, backend_settings=settings, **case
    )
    for result in results:
        found, expected = torch.tensor(result["losses"]), torch.tensor(alone["losses"])
        torch.testing.assert_close(found[0], expected[0], **FIRST_LOSS)
        torch.testing.assert_close(found, expected, **LATER_LOSS)
        torch.testing.assert_close(
            torch.tensor(result["norms"]), torch.tensor(alone["norms"]), rtol=1e-3, atol=1e-5
        )
        assert result["weights"].keys() == alone["weights"].keys()
        for name, tensor in result["weights"].items():
            end, start = alone["weights"][name].double(), alone["start"][name].double()
            rounding = 1e-6 * end.norm() + 1e-6
            assert (tensor - end).norm() <= MOVEMENT * (end - start).norm() + rounding, name
            assert torch.equal(tensor, results[0]["weights"][name]), name
    return results


def deepspeed(stage: int, **settings: Any) -> dict[str, Any]:
    return {"backend": "deepspeed", "backend_settings": {"zero_stage": stage, **settings}}


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
    classes = 10 if method == "concept_tuning" else MANY_CLASSES
    equal_to_one_process(two_ranks, method, kind, classes=classes, **deepspeed(stage))


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
    alone = _alone(tuple({"method": "dr_tune", "kind": "vit", "bank_scope": scope, **case}.items()))["bank"]
    if scope == "gathered":
        assert all(torch.equal(bank["ids"], alone["ids"]) for bank in banks)
        assert torch.equal(banks[0]["fingerprint"], banks[1]["fingerprint"])
    else:
        # slot s lies on rank s modulo 2
        assert all(len(bank["ids"]) == 20 for bank in banks)
        assert torch.equal(torch.stack([bank["ids"] for bank in banks], 1).flatten(), alone["ids"])


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
@pytest.mark.parametrize("stage", ["ddp", *STAGES])
@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_four_ranks_equal_one_process(four_ranks: RankPool, method: str, stage: str | int) -> None:
    chosen = {"backend": "ddp"} if isinstance(stage, str) else deepspeed(stage)
    classes = 10 if method == "concept_tuning" else MANY_CLASSES
    equal_to_one_process(four_ranks, method, "vit", classes=classes, **chosen)
