"""ring_push_: the bank against a list to which rows are appended one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS, KERNELS
from torch import Tensor

from mooring_kernels import ring_push_

FIXTURES_ARE_CONSTANT = [HealthCheck.function_scoped_fixture]


def empty_bank(slots: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    fields = [torch.zeros(slots, width, dtype=dtype) for width in (5, 33)]
    return fields, torch.full((slots,), -1)


def draw(rows: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    fields = [torch.randn(rows, width, generator=generator) for width in (5, 33)]
    return fields, torch.arange(100 * seed, 100 * seed + rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "slots,rows,head", [(8, 3, 0), (8, 3, 6), (8, 8, 5), (8, 11, 5), (8, 24, 2), (1, 1, 0), (1, 4, 0)]
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_land_where_one_by_one_would_put_them(
    impl: Any, slots: int, rows: int, head: int, dtype: torch.dtype, assert_within: Any
) -> None:
    (bank, bank_labels), (fields, labels) = empty_bank(slots, dtype), draw(rows, 1)
    expected = [torch.zeros(field.shape, dtype=torch.float64) for field in bank]
    expected_labels = torch.full((slots,), -1)
    for i in range(rows):
        slot = (head + i) % slots
        expected_labels[slot] = labels[i]
        for target, field in zip(expected, fields, strict=True):
            row = field[i].double()
            target[slot] = row / row.norm()
    assert ring_push_(bank, bank_labels, fields, labels, head, impl=impl) == (head + rows) % slots
    assert torch.equal(bank_labels, expected_labels)
    for got, target in zip(bank, expected, strict=True):
        assert_within(got, target, operations=target.shape[1] + 6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_normalisation_the_cast_rounds_to_nearest_even(impl: Any) -> None:
    # bf16 keeps 8 bits: 1 + 2^-8 and 1 + 3 * 2^-8 lie half way, and go to the even neighbour
    values = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, -1.5, 1 + 2**-8 + 2**-20]])
    bank = torch.zeros(1, 4, dtype=torch.bfloat16)
    ring_push_(
        [bank], torch.zeros(1, dtype=torch.int64), [values], torch.tensor([3]), 0, normalise=False, impl=impl
    )
    assert torch.equal(bank.float(), torch.tensor([[1.0, 1 + 2**-6, -1.5, 1 + 2**-7]]))


@settings(max_examples=25, deadline=None, suppress_health_check=FIXTURES_ARE_CONSTANT)
@given(slots=st.integers(1, 9), sizes=st.lists(st.integers(0, 14), max_size=5))
def test_pieces_and_the_whole_give_the_same_bank(slots: int, sizes: list[int]) -> None:
    """B not dividing K, B > K, wrap, n < K: bit for bit the same, whatever the split."""
    fields, labels = draw(sum(sizes), 2)
    (whole, whole_labels), (pieces, piece_labels) = empty_bank(slots), empty_bank(slots)
    end = ring_push_(whole, whole_labels, fields, labels, 0)
    head = start = 0
    for size in sizes:
        part = slice(start, start + size)
        head = ring_push_(pieces, piece_labels, [field[part] for field in fields], labels[part], head)
        start += size
    assert head == end == sum(sizes) % slots
    assert torch.equal(whole_labels, piece_labels)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    newest = labels[max(0, sum(sizes) - slots) :]
    assert sorted(whole_labels[whole_labels >= 0].tolist()) == newest.tolist()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_padding_takes_a_slot_and_zero_rows_stay_zero(impl: Any) -> None:
    bank, bank_labels = torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
    rows = torch.tensor([[3.0, 4.0], [1.0, 1.0], [0.0, 0.0]])
    assert ring_push_([bank], bank_labels, [rows], torch.tensor([7, -1, 8]), 1, impl=impl) == 1
    assert bank_labels.tolist() == [8, 7, -1]
    torch.testing.assert_close(bank[:2], torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


@pytest.mark.parametrize("impl", KERNELS)
def test_strided_and_bf16_rows(impl: Any, generator: torch.Generator) -> None:
    rows = torch.randn(6, 3, generator=generator).to(torch.bfloat16).T  # [3, 6]
    bank, expected = torch.zeros(4, 6), torch.zeros(4, 6)
    labels = torch.arange(6)[::2]
    for target, chosen in ((bank, impl), (expected, "reference")):
        ring_push_([target], torch.zeros(4, dtype=torch.int64), [rows], labels, 2, impl=chosen)
    torch.testing.assert_close(bank, expected, rtol=1e-6, atol=1e-7)


def test_no_gradient_passes_into_the_bank() -> None:
    (bank, bank_labels), (fields, labels) = empty_bank(4), draw(3)
    for impl in ("reference", "auto"):
        ring_push_(bank, bank_labels, [f.requires_grad_() for f in fields], labels, 0, impl=impl)  # type: ignore[arg-type]
        assert not any(field.requires_grad for field in bank)
