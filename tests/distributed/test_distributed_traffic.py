"""Every exchange is counted: against what reaches torch's dispatcher, and gradients and parameters by hand."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
from equality import STAGES, deepspeed
from ranks import RankPool
from traffic_cases import trained_sizes

CLASSES = 121  # with it the head's sizes are odd, and what is divided is padded
DDP = {"backend": "ddp"}


@pytest.mark.parametrize("backend", [DDP, *(deepspeed(stage) for stage in STAGES)], ids=str)
@pytest.mark.parametrize("micros", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_gradients_and_parameters_by_hand(two_ranks: RankPool, backend: dict[str, Any], micros: int) -> None:
    """In fp32 bytes. DeepSpeed 0.19.8 reduces whole gradients at stages 1 and 2 too, at 2 in every micro-batch, and at
    stage 3 keeps what it gathered for a forward until the backward: the model is smaller than its limit."""
    sizes = trained_sizes("fine_tune", "vit", CLASSES)
    found = two_ranks.run(
        "traffic_cases:counted_and_dispatched",
        method="fine_tune", kind="vit", classes=CLASSES, micros=micros, clip=0.5, **backend,
    )  # fmt: skip
    stage = backend.get("backend_settings", {}).get("zero_stage", 0)
    reduced = 4 * sum(2 * ceil(size / 2) if stage == 3 else size for size in sizes)
    expected = {"gradients": reduced * (micros if stage >= 2 else 1)}
    if stage == 3:  # each parameter's part, padded by itself
        expected["parameters"] = micros * 4 * sum(ceil(size / 2) for size in sizes)
    elif stage > 0:  # the part of a flat group: head and backbone, each padded to whole pairs of ranks
        head = sizes[-2:] if sizes[-1] == CLASSES else sizes[:2]
        groups = (sum(head), sum(sizes) - sum(head))
        expected["parameters"] = 4 * sum(2 * ceil(size / 4) for size in groups)
    for result in found:
        step = dict(result["a step"])
        assert step.pop("agreement") <= 64  # norms, flags and the mean of the loss
        assert step == expected
        assert sum(result["counted"].values()) == sum(result["dispatched"].values())


@pytest.mark.parametrize(
    "method, settings",
    [
        pytest.param("dr_tune", {"bank_scope": "gathered", "rotation_period": 2}, marks=pytest.mark.slow),
        ("dr_tune", {"bank_scope": "sharded", "rotation_period": 2}),
        pytest.param("core_tuning", {}, marks=pytest.mark.slow),
        ("daft", {"kind": "cnn"}),
        ("bi_tuning", {"queue_scope": "sharded"}),
    ],
)
@pytest.mark.parametrize("backend", [DDP, deepspeed(3)], ids=["ddp", "zero3"])
def test_nothing_that_torch_exchanges_is_missing(
    two_ranks: RankPool, method: str, settings: dict[str, Any], backend: dict[str, Any]
) -> None:
    case: dict[str, Any] = {"kind": "vit", "classes": CLASSES, **settings, **backend}
    for result in two_ranks.run("traffic_cases:counted_and_dispatched", method=method, **case):
        assert sum(result["counted"].values()) == sum(result["dispatched"].values())
