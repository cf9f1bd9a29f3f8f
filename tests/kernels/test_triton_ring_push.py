"""Triton ring push against an independent loop over rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from mooring_kernels.ring_push.gpu import NORM_FLOOR, ring_push_fwd

# (K, B, head): no wrap, wrap, one row, whole ring from its middle, B that does not divide K
CASES = [(7, 3, 0), (7, 4, 5), (5, 1, 4), (6, 6, 2), (37, 20, 30)]


def loop(
    banks: list[Tensor], bank_labels: Tensor, fields: list[Tensor], labels: Tensor, head: int, unit: bool
) -> None:
    for i in range(labels.shape[0]):
        slot = (head + i) % bank_labels.shape[0]
        for bank, field in zip(banks, fields, strict=True):
            row = field[i].double()
            bank[slot] = row / row.norm().clamp_min(NORM_FLOOR) if unit else row
        bank_labels[slot] = labels[i]


@pytest.mark.parametrize("normalise", [True, False], ids=["unit", "raw"])
@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("field_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "K{}-B{}-head{}".format(*c))
def test_push(
    case: tuple[int, int, int],
    field_dtype: torch.dtype,
    bank_dtype: torch.dtype,
    normalise: bool,
    device: torch.device,
    generator: torch.Generator,
    guard: Any,
    assert_within: Any,
) -> None:
    slots, rows, head = case
    widths = (65, 16)
    fields = [torch.randn(rows, d, generator=generator).to(device, field_dtype) for d in widths]
    fields[0][0] = 0.0
    labels = torch.randint(0, 9, (rows,), generator=generator).to(device)
    banks = [guard(torch.randn(slots, d, generator=generator).to(device, bank_dtype)) for d in widths]
    bank_labels = guard(torch.full((slots,), -1, device=device))
    expected = [bank.double() for bank in banks]
    expected_labels = bank_labels.clone()
    given = [field.clone() for field in fields]

    ring_push_fwd(banks, bank_labels, fields, labels, head, normalise)

    loop(expected, expected_labels, fields, labels, head, normalise)
    assert torch.equal(bank_labels, expected_labels)
    assert all(torch.equal(field, before) for field, before in zip(fields, given, strict=True))
    written = (torch.arange(rows) + head) % slots
    untouched = torch.ones(slots, dtype=torch.bool)
    untouched[written] = False
    for bank, exact in zip(banks, expected, strict=True):
        if normalise:
            assert_within(bank[written], exact[written], operations=65**0.5 + 8)
        else:
            assert torch.equal(bank[written], exact[written].to(bank_dtype))
        assert torch.equal(bank[untouched].double(), exact[untouched])


def test_strided_bank_and_field(device: torch.device, generator: torch.Generator) -> None:
    block = torch.zeros(5, 40, device=device)
    bank, bank_labels = block[:, 4:24:2], torch.full((5,), -1, device=device)
    field = torch.randn(10, 3, generator=generator).to(device).T
    ring_push_fwd([bank], bank_labels, [field], torch.tensor([1, 2, 3], device=device), 4, False)
    assert torch.equal(bank[[4, 0, 1]], field)
    assert bank_labels.tolist() == [2, 3, -1, -1, 1]
    block[:, 4:24:2] = 0.0
    assert not block.any(), "the columns between the bank's own were written"


def test_no_rows_changes_nothing(device: torch.device) -> None:
    bank, labels = torch.ones(3, 4, device=device), torch.tensor([0, 1, -1], device=device)
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    ring_push_fwd([bank], labels, [torch.zeros(0, 4, device=device)], nothing, 1, True)
    assert torch.equal(bank, torch.ones_like(bank)) and labels.tolist() == [0, 1, -1]
