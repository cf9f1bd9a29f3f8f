"""class_ring_push_: the bank against one plain Python list per class to which rows are appended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS
from torch import Tensor

from mooring_kernels import class_ring_push_

FIXTURES_ARE_CONSTANT = [HealthCheck.function_scoped_fixture]
INNER = ((5,), (3, 33))  # an image row, and three patches


class Bank:
    """A bank's tensors, and the same bank as plain Python."""

    def __init__(self, classes: int, capacity: int, dtype: torch.dtype = torch.float32) -> None:
        self.fields = [torch.zeros(classes, capacity, *inner, dtype=dtype) for inner in INNER]
        self.labels = torch.full((classes, capacity), -1)
        self.heads = torch.zeros(classes, dtype=torch.int64)
        self.plain: dict[tuple[int, int], list[Tensor]] = {}
        self.plain_heads = [0] * classes

    def push(self, fields: list[Tensor], labels: Tensor, **options: Any) -> Tensor:
        return class_ring_push_(self.fields, self.labels, self.heads, fields, labels, **options)

    def push_plainly(self, fields: list[Tensor], labels: Tensor) -> None:
        classes, capacity = self.labels.shape
        for i, label in enumerate(labels.tolist()):
            if 0 <= label < classes:
                slot = self.plain_heads[label]
                self.plain[label, slot] = [field[i] for field in fields]
                self.plain_heads[label] = (slot + 1) % capacity

    def check(self, assert_within: Any) -> None:
        classes, capacity = self.labels.shape
        assert self.heads.tolist() == self.plain_heads
        expected = torch.full((classes, capacity), -1)
        for label, slot in self.plain:
            expected[label, slot] = label
        assert torch.equal(self.labels, expected)
        for number, bank in enumerate(self.fields):
            exact = torch.zeros(bank.shape, dtype=torch.float64)
            for place, rows in self.plain.items():
                row = rows[number].double()
                exact[place] = row / row.norm(dim=-1, keepdim=True)
            assert_within(bank, exact, operations=bank.shape[-1] + 6)


def draw(rows: int, classes: int, seed: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    fields = [torch.randn(rows, *inner, generator=generator) for inner in INNER]
    return fields, torch.randint(-1, classes + 1, (rows,), generator=generator)


# one class over and over; more rows than a ring; wrap-around; nothing; more rows than one program ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "classes,capacity,sizes", [(1, 4, [3, 7, 0]), (3, 2, [5, 9, 1]), (4, 6, [11, 20]), (2, 1, [70])], ids=str
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_land_where_one_by_one_would_put_them(
    impl: Any, classes: int, capacity: int, sizes: list[int], dtype: torch.dtype, assert_within: Any
) -> None:
    bank = Bank(classes, capacity, dtype)
    for number, size in enumerate(sizes):
        fields, labels = draw(size, classes, number)
        before, given_labels = [f.clone() for f in fields], labels.clone()
        slots = bank.push(fields, labels, impl=impl)
        bank.push_plainly(fields, labels)
        bank.check(assert_within)
        assert torch.equal(labels, given_labels)
        assert all(torch.equal(a, b) for a, b in zip(fields, before, strict=True))
        written = slots[slots >= 0]
        assert len(written.unique()) == len(written)  # no slot twice: any order of writing is right
        assert torch.equal(written // capacity, labels[slots >= 0])


@settings(max_examples=25, deadline=None, suppress_health_check=FIXTURES_ARE_CONSTANT)
@given(classes=st.integers(1, 4), capacity=st.integers(1, 5), sizes=st.lists(st.integers(0, 12), max_size=4))
def test_pieces_and_the_whole_give_the_same_bank(classes: int, capacity: int, sizes: list[int]) -> None:
    fields, labels = draw(sum(sizes), classes, 2)
    whole, pieces = Bank(classes, capacity), Bank(classes, capacity)
    whole.push(fields, labels)
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        pieces.push([field[part] for field in fields], labels[part])
        start += size
    assert torch.equal(whole.labels, pieces.labels) and torch.equal(whole.heads, pieces.heads)
    assert all(torch.equal(a, b) for a, b in zip(whole.fields, pieces.fields, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_casts_strides_and_no_gradient(impl: Any, generator: torch.Generator) -> None:
    rows = torch.randn(4, 2, 6, generator=generator).to(torch.bfloat16).requires_grad_()
    labels = torch.stack([torch.tensor([1, 0, -1, 1])] * 2, 1)[:, 0]
    bank, bank_labels = torch.zeros(2, 3, 6, 2), torch.full((2, 3), -1)
    heads = torch.tensor([2, 2])
    slots = class_ring_push_(
        [bank], bank_labels, heads, [rows.transpose(1, 2)], labels, normalise=False, impl=impl
    )
    assert slots.tolist() == [5, 2, -1, 3] and heads.tolist() == [0, 1] and not bank.requires_grad
    assert torch.equal(bank[1, 2], rows[0].T.float()) and torch.equal(bank[1, 0], rows[3].T.float())
    assert bank_labels.tolist() == [[-1, -1, 0], [1, -1, 1]]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_is_written_around_the_bank(impl: Any, guard: Any, device: torch.device) -> None:
    bank = Bank(3, 2)
    bank.fields, bank.labels, bank.heads = (
        [guard(f) for f in bank.fields],
        guard(bank.labels),
        guard(bank.heads),
    )
    fields, labels = draw(40, 3, 5)
    fields[0][labels < 0] = torch.nan  # not read
    slots = bank.push(fields, labels, impl=impl)
    assert slots.shape == (40,) and all(field.isfinite().all() for field in bank.fields)
