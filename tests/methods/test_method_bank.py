"""The feature bank: what is in it after any sequence of pushes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mooring.methods.bank import BankSpec, FeatureBank


def push_rows(bank: FeatureBank, count: int, start: int) -> None:
    ids = torch.arange(start, start + count)
    rows = torch.nn.functional.normalize(
        torch.randn(count, 5, generator=torch.Generator().manual_seed(start))
    )
    bank.push({"frozen": 3 * rows, "tuned": -2 * rows}, ids % 7, ids)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(0, 14), max_size=6))
def test_holds_the_newest_rows_whatever_the_batch_sizes(rows: int, sizes: list[int]) -> None:
    """B not dividing K, B > K, wrap-around, n < K: always the last K rows, labels and fields together."""
    bank = FeatureBank(BankSpec(rows, {"frozen": 5, "tuned": 5}))
    pushed = 0
    for size in sizes:
        push_rows(bank, size, pushed)
        pushed += size
    view = bank.view()
    valid = view.labels >= 0
    assert sorted(view.ids[valid].tolist()) == list(range(max(0, pushed - rows), pushed))
    assert torch.equal(view.labels[valid], view.ids[valid] % 7)
    assert len(bank) == min(rows, pushed)
    torch.testing.assert_close(view["frozen"][valid], -view["tuned"][valid])
    torch.testing.assert_close(view["frozen"][valid].norm(dim=1), torch.ones(int(valid.sum())))


def test_padding_rows_take_a_slot_and_stay_masked() -> None:
    bank = FeatureBank(BankSpec(4, {"f": 2}))
    bank.push({"f": torch.ones(3, 2)}, torch.tensor([1, -1, 2]), torch.tensor([5, 6, 7]))
    assert bank.view().labels.tolist() == [1, -1, 2, -1]
    assert bank.view().ids.tolist() == [5, -1, 7, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trips_bit_for_bit(dtype: torch.dtype) -> None:
    one = FeatureBank(BankSpec(6, {"frozen": 5, "tuned": 5}, dtype))
    push_rows(one, 4, 0)
    push_rows(one, 4, 4)
    two = FeatureBank(BankSpec(6, {"frozen": 5, "tuned": 5}, dtype))
    two.load_state_dict(one.state_dict())
    for bank in (one, two):
        push_rows(bank, 3, 8)
    assert torch.equal(one.fingerprint(), two.fingerprint())
    for name in ("frozen", "tuned"):
        assert torch.equal(one.view()[name], two.view()[name])


def test_fingerprint_sees_one_changed_element_and_a_swap() -> None:
    bank = FeatureBank(BankSpec(6, {"frozen": 5, "tuned": 5}))
    push_rows(bank, 6, 0)
    first = bank.fingerprint()
    bank.view()["tuned"][2, 3] += 1e-6
    assert not torch.equal(first, bank.fingerprint())
    other = FeatureBank(BankSpec(6, {"frozen": 5, "tuned": 5}))
    push_rows(other, 6, 0)
    other.view()["tuned"][[0, 1]] = other.view()["tuned"][[1, 0]]
    assert not torch.equal(first, other.fingerprint())


def test_wrong_fields_and_shapes_are_named() -> None:
    bank = FeatureBank(BankSpec(4, {"frozen": 5, "tuned": 5}))
    with pytest.raises(ValueError, match=r"holds the fields \['frozen', 'tuned'\], got \['frozen'\]"):
        bank.push(
            {"frozen": torch.ones(1, 5)}, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        )
    other = FeatureBank(BankSpec(4, {"frozen": 7, "tuned": 5}))
    with pytest.raises(ValueError, match="resume with the same settings"):
        bank.load_state_dict(other.state_dict())
