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


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": "paper", "loss_form": "paper"},
        pytest.param({"calibration": "paper", "translation": False}, marks=pytest.mark.slow),
        pytest.param({"calibration": "paper", "rotation": "off"}, marks=pytest.mark.slow),
        {"translation": False},
        pytest.param({"translation": False, "rotation": "off"}, marks=pytest.mark.slow),
        pytest.param({"cga_scale": 20.0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_calibration_of_a_sharded_bank(two_ranks: RankPool, changes: dict[str, Any]) -> None:
    case = {"bank_size": 40, "steps": 4, "rotation_period": 2, "bank_scope": "sharded", "padded": 3}
    equal_to_one_process(two_ranks, "dr_tune", "vit", backend="ddp", **case, **changes)


@pytest.mark.parametrize(
    "method, changes, stage",
    [
        ("bi_tuning", {"classes": 11}, "ddp"),
        ("bi_tuning", {"classes": MANY_CLASSES, "micros": 2}, 3),
        ("concept_tuning", {"classes": 5, "padded": 9}, "ddp"),  # rank 1 has no valid row
        ("concept_tuning", {"classes": 5, "concept_source": "channel_slices", "channel_slices": 4}, "ddp"),
    ],
    ids=str,
)
def test_a_sharded_class_queue_is_that_of_one_process(
    two_ranks: RankPool, method: str, changes: dict[str, Any], stage: str | int
) -> None:
    """C is no multiple of the ranks; enough steps that rings fill and wrap."""
    settings = {"backend": "ddp"} if isinstance(stage, str) else deepspeed(stage)
    case = {"queue_scope": "sharded", "steps": 4, "queue_rows": 3, "padded": 3, **changes}
    results = equal_to_one_process(two_ranks, method, "vit", **case, **settings)
    single = alone(method, "vit", **case)["bank"]
    rings = single["ids"].view(changes["classes"], 3)
    labels = single["labels"].view(changes["classes"], 3)
    for rank, result in enumerate(results):
        own = rings[rank::2]
        assert torch.equal(result["bank"]["ids"].view(-1, 3)[: len(own)], own)
        assert torch.equal(result["bank"]["labels"].view(-1, 3)[: len(own)], labels[rank::2])
        assert {"queue queries", "queue sums", "queue gradient", "bank rows"} <= set(result["bytes"])


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
@pytest.mark.parametrize("padded", [5, 8, 11])
@pytest.mark.parametrize("backend", [{"backend": "ddp"}, deepspeed(1), deepspeed(3)], ids=str)
@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_unequal_valid_rows_are_weighted_in_every_method(
    two_ranks: RankPool, method: str, backend: dict[str, Any], padded: int
) -> None:
    """Of 16 rows; with 8 or 11 of them rank 1 has none."""
    equal_to_one_process(two_ranks, method, "vit", padded=padded, **backend)


@pytest.mark.parametrize("backend", [{"backend": "ddp"}, *(deepspeed(stage) for stage in STAGES)], ids=str)
def test_accumulation_and_clipping(two_ranks: RankPool, backend: dict[str, Any]) -> None:
    equal_to_one_process(two_ranks, "fine_tune", "vit", micros=2, clip=0.5, **backend)


@pytest.mark.parametrize("stage", [pytest.param(s, marks=case_mark(always=s in (0, 2))) for s in STAGES])
def test_adamw(two_ranks: RankPool, stage: int) -> None:
    equal_to_one_process(two_ranks, "lp_ft", "vit", optimizer="adamw", **deepspeed(stage))


OFFLOADED = [
    (1, {"offload_optimizer": True}),
    (2, {"offload_optimizer": True}),
    (3, {"offload_optimizer": True}),
    (3, {"offload_parameters": True}),
    (3, {"offload_optimizer": True, "offload_parameters": True}),
]


@pytest.mark.parametrize(
    "stage, settings",
    [pytest.param(*case, marks=case_mark(always=case == OFFLOADED[-1])) for case in OFFLOADED],
)
@pytest.mark.parametrize("method", ["dr_tune", pytest.param("lp_ft", marks=pytest.mark.slow)])
def test_offloading(two_ranks: RankPool, method: str, stage: int, settings: dict[str, Any]) -> None:
    """Two micro-batches, a clipped gradient, AdamW; parameters that rest."""
    case = {"micros": 2, "clip": 0.5, "optimizer": "adamw", "classes": MANY_CLASSES}
    equal_to_one_process(two_ranks, method, "vit", **case, **deepspeed(stage, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "cnn"])
@pytest.mark.parametrize("stage", ["ddp", *STAGES])
@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_four_ranks_equal_one_process(four_ranks: RankPool, method: str, stage: str | int, kind: str) -> None:
    chosen = {"backend": "ddp"} if isinstance(stage, str) else deepspeed(stage)
    equal_to_one_process(four_ranks, method, kind, classes=classes_of(method), **chosen)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ddp", *STAGES])
@pytest.mark.parametrize(
    "method, changes",
    [
        ("dr_tune", {"bank_scope": "sharded"}),
        ("dr_tune", {"bank_scope": "sharded", "calibration": "paper", "loss_form": "paper"}),
        ("bi_tuning", {"queue_scope": "sharded"}),
        ("concept_tuning", {"queue_scope": "sharded"}),
        (
            "concept_tuning",
            {"queue_scope": "sharded", "concept_source": "channel_slices", "channel_slices": 4},
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("ranks", ["two_ranks", "four_ranks"])
def test_sharded_banks_at_every_stage(
    request: pytest.FixtureRequest, ranks: str, method: str, changes: dict[str, Any], stage: str | int
) -> None:
    settings = {"backend": "ddp"} if isinstance(stage, str) else deepspeed(stage)
    case = {"classes": classes_of(method), "steps": 4, "padded": 3, **changes}
    equal_to_one_process(request.getfixturevalue(ranks), method, "vit", **case, **settings)
