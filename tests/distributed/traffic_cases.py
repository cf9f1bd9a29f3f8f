"""What each rank runs for test_distributed_traffic."""

from __future__ import annotations

from typing import Any

from equality_cases import train
from method_cases import make_method, trained_parameters

from bench.distributed.exchanges import Dispatched
from mooring.traffic import TRAFFIC, grown


def counted_and_dispatched(**case: Any) -> dict[str, Any]:
    """A few steps, the bytes that we count and those that torch sees, from the first weights to the last ones."""
    before = TRAFFIC.bytes.copy()
    with Dispatched() as dispatched:
        result = train(**case)
    return {
        "counted": grown(TRAFFIC.bytes, before),
        "dispatched": dict(dispatched.bytes),
        "a step": result["bytes"],
    }


def trained_sizes(method: str, kind: str, classes: int) -> list[int]:
    """Elements of each trained parameter."""
    return [p.numel() for p in trained_parameters(make_method(method, kind, classes))]
