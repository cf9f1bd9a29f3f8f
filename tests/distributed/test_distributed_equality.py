"""Several ranks compute what one process computes from the same global batches."""

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


@cache
def _alone(case: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return train(**dict(case))


def equal_to_one_process(pool: RankPool, method: str, kind: str, backend: str = "ddp", **case: Any) -> Any:
    """The ranks' results, after comparing them with those of one process."""
    settings = case.pop("backend_settings", None)
    alone = _alone(tuple({"method": method, "kind": kind, **case}.items()))
    results = pool.run(
        "equality_cases:train", method=method, kind=kind, backend=backend, backend_settings=settings, **case
    )
    for result in results:
        found, expected = torch.tensor(result["losses"]), torch.tensor(alone["losses"])
        torch.testing.assert_close(found[0], expected[0], **FIRST_LOSS)
        torch.testing.assert_close(found, expected, **LATER_LOSS)
        assert result["weights"].keys() == alone["weights"].keys()
        for name, tensor in result["weights"].items():
            end, start = alone["weights"][name].double(), alone["start"][name].double()
            rounding = 1e-6 * end.norm() + 1e-6
            assert (tensor - end).norm() <= MOVEMENT * (end - start).norm() + rounding, name
            assert torch.equal(tensor, results[0]["weights"][name]), name
    return results


def steps_of(method: str, kind: str) -> int:
    """How many steps stay comparable: rounding grows fast through batch statistics of few values."""
    return 2 if kind == "cnn" and make_method(method).requirements.batchnorm == "train" else 3


@pytest.mark.parametrize("kind", ["vit", "cnn"])
@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_two_ranks_equal_one_process(two_ranks: RankPool, method: str, kind: str) -> None:
    equal_to_one_process(two_ranks, method, kind, steps=steps_of(method, kind))
