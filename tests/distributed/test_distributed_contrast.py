"""Contrasts with a sharded class queue equal those with the whole one: losses, gradients of queries and own keys."""

from __future__ import annotations

import pytest
import torch
from ranks import RankPool


def _equal(pool: RankPool, **case: float) -> None:
    # sums in another order move a logit of up to 1 / T by some roundings; the softmax makes that relative
    error = 4 * 2.0**-23 / case["temperature"] + 1e-6
    for result in pool.run("contrast_cases:contrasts", **case):
        found, expected = result["found"], result["expected"]
        torch.testing.assert_close(found[0], expected[0], rtol=3e-6, atol=error)
        for grad, wanted in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(grad, wanted, rtol=error, atol=error * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "case",
    [
        {"classes": 7, "rows": 6, "likeness": 0.0, "temperature": 0.2, "negatives": 4},
        {"classes": 2, "rows": 3, "likeness": 1.0, "temperature": 0.07, "negatives": 1},
        # own key and positives take nearly all of the softmax, in logits of some 1000
        {"classes": 5, "rows": 5, "likeness": 8.0, "temperature": 1e-3, "negatives": 4},
    ],
    ids=str,
)
def test_two_ranks(two_ranks: RankPool, case: dict[str, float]) -> None:
    _equal(two_ranks, **case)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3, 4, 9])  # fewer classes than ranks: some have none
def test_four_ranks(four_ranks: RankPool, classes: int) -> None:
    _equal(four_ranks, classes=classes, rows=4, likeness=1.0, temperature=0.07, negatives=classes - 1)
