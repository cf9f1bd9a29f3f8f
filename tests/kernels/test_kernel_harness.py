"""The tools of the kernel tests do what the other tests rely on."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch


def test_fresh_memory_is_poisoned() -> None:
    for fresh in (torch.empty(5), torch.empty_like(torch.ones(2, 3)), torch.ones(2).new_empty(4)):
        assert fresh.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_error_model_accepts_rounding_and_refuses_more(assert_within: Any) -> None:
    expected = torch.tensor([1.0, -3.0], dtype=torch.float64)
    assert_within(expected.bfloat16(), expected, operations=0)
    assert_within(expected.float() * (1 + 2.0**-22), expected, operations=4, magnitude=3.0)
    with pytest.raises(AssertionError, match="over its bound"):
        assert_within(expected.float() * (1 + 2.0**-20), expected, operations=4, magnitude=1.0)
    with pytest.raises(AssertionError, match="NaN"):
        assert_within(torch.tensor([float("nan"), -3.0]), expected, operations=1e9)


@pytest.mark.skipif(os.environ.get("MOORING_GPU") == "1", reason="about the interpreter")
def test_interpreter_casts_bf16_as_a_gpu_does(generator: torch.Generator) -> None:
    """Round to nearest even, in both directions, for ordinary, huge, subnormal and special values."""
    pytest.importorskip("triton")
    from mooring_kernels.ring_push.gpu import ring_push_fwd

    values = torch.randn(1, 4096, generator=generator)
    values[0, :6] = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-40, 1.00390625])
    bank = torch.zeros(1, 4096, dtype=torch.bfloat16)
    labels = torch.zeros(1, dtype=torch.int64)
    ring_push_fwd([bank], labels, [values], labels, 0, False)
    expected = values.bfloat16()
    assert torch.equal(bank.isnan(), expected.isnan())
    assert torch.equal(bank.nan_to_num(), expected.nan_to_num())
    back = torch.zeros(1, 4096)
    ring_push_fwd([back], labels, [bank], labels, 0, False)
    assert torch.equal(back.nan_to_num(), bank.float().nan_to_num())
