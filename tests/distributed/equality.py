"""Whether several ranks and one process compute the same: the runs of both, the tolerances, the differences."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from equality_cases import train
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


def classes_of(method: str) -> int:
    """Concept-Tuning keeps queues per class: a few classes have rows in every batch."""
    return 10 if method == "concept_tuning" else MANY_CLASSES


def deepspeed(stage: int, **settings: Any) -> dict[str, Any]:
    return {"backend": "deepspeed", "backend_settings": {"zero_stage": stage, **settings}}


def alone(method: str, kind: str, **case: Any) -> dict[str, Any]:
    """What one process computes; once for each case."""
    return _alone(tuple({"method": method, "kind": kind, **case}.items()))


@cache
def _alone(case: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return train(**dict(case))


def both(
    pool: RankPool, method: str, kind: str, backend: str = "ddp", **case: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Results by rank, and that of one process."""
    settings = case.pop("backend_settings", None)
    # rounding grows fast through batch statistics of few values
    case.setdefault("steps", 2 if kind == "cnn" and method in BATCH_STATISTICS else 3)
    single = alone(method, kind, **case)
    results = pool.run(
        "equality_cases:train", method=method, kind=kind, backend=backend, backend_settings=settings, **case
    )
    return results, single


def check_equal(results: list[dict[str, Any]], single: dict[str, Any]) -> None:
    """
    Raises:
        AssertionError: a rank differs by more than the order of sums explains, or from another rank at all.
    """
    for result in results:
        found, expected = torch.tensor(result["losses"]), torch.tensor(single["losses"])
        torch.testing.assert_close(found[0], expected[0], **FIRST_LOSS)
        torch.testing.assert_close(found, expected, **LATER_LOSS)
        torch.testing.assert_close(
            torch.tensor(result["norms"]), torch.tensor(single["norms"]), rtol=1e-3, atol=1e-5
        )
        assert result["weights"].keys() == single["weights"].keys()
        far = {
            name: share for name, share in movement_differences(result, single).items() if share > MOVEMENT
        }
        assert not far, f"moved elsewhere, by these shares of the movement: {far}"
        for name, tensor in result["weights"].items():
            assert torch.equal(tensor, results[0]["weights"][name]), name


def movement_differences(result: dict[str, Any], single: dict[str, Any]) -> dict[str, float]:
    """By tensor: how far it is from where one process has it, as a share of how far that one moved it.

    The movement counts as no less than rounding over ``MOVEMENT``, so that what does not move may still round.
    """
    shares = {}
    for name, tensor in result["weights"].items():
        end, start = single["weights"][name].double(), single["start"][name].double()
        rounding = 1e-6 * end.norm() + 1e-6
        shares[name] = float((tensor - end).norm() / ((end - start).norm() + rounding / MOVEMENT))
    return shares


def differences(results: list[dict[str, Any]], single: dict[str, Any]) -> dict[str, float]:
    """The largest over ranks, steps and tensors."""
    expected = torch.tensor(single["losses"], dtype=torch.float64)
    losses = [
        ((torch.tensor(result["losses"], dtype=torch.float64) - expected) / expected).abs()
        for result in results
    ]
    return {
        "first_loss_difference": max(float(each[0]) for each in losses),
        "loss_difference": max(float(each.max()) for each in losses),
        "movement_difference": max(max(movement_differences(r, single).values()) for r in results),
    }
