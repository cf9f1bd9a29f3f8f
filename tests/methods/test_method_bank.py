"""The feature bank: what is in it after any sequence of pushes."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mooring.distributed import Ranks
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


CLASSES = 3


def by_class(capacity: int, dtype: torch.dtype = torch.float32) -> FeatureBank:
    fields = {"image": 5, "patches": (4, 5)}
    return FeatureBank(BankSpec(capacity, fields, dtype, layout="per_class", classes=CLASSES))


def push_images(bank: FeatureBank, count: int, start: int) -> list[tuple[int, int]]:
    """Rows in which every number is the id or its negative, before they are normalised; their labels and ids."""
    generator = torch.Generator().manual_seed(start)
    labels, ids = (
        torch.randint(-1, CLASSES + 1, (count,), generator=generator),
        torch.arange(start, start + count),
    )
    rows = ids.float()[:, None].expand(-1, 5) + 1
    bank.push({"image": rows, "patches": -rows[:, None].expand(-1, 4, -1)}, labels, ids)
    return list(zip(labels.tolist(), ids.tolist(), strict=True))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(0, 20), max_size=5))
def test_each_class_holds_its_newest_rows(capacity: int, sizes: list[int]) -> None:
    """Against a plain ring per class: repeated labels, B > K, wrap-around, labels that are no class."""
    bank, pushed = by_class(capacity), 0
    rings = [[-1] * capacity for _ in range(CLASSES)]
    heads = [0] * CLASSES
    for size in sizes:
        for label, number in push_images(bank, size, pushed):
            if 0 <= label < CLASSES:
                rings[label][heads[label]] = number
                heads[label] = (heads[label] + 1) % capacity
        pushed += size
    view = bank.view()
    assert view.ids.view(CLASSES, capacity).tolist() == rings
    expected = [[label if number >= 0 else -1 for number in ring] for label, ring in enumerate(rings)]
    assert view.labels.view(CLASSES, capacity).tolist() == expected
    filled = view.labels >= 0
    assert len(bank) == int(filled.sum())
    unit = torch.full((5,), 5**-0.5)
    torch.testing.assert_close(view["image"], filled[:, None] * unit)
    torch.testing.assert_close(view["patches"], -(filled[:, None, None] * unit).expand(-1, 4, -1))


def test_a_ring_per_class_round_trips_and_tells_heads_apart() -> None:
    one, two = by_class(2, torch.bfloat16), by_class(2, torch.bfloat16)
    push_images(one, 20, 0)
    assert not torch.equal(one.fingerprint(), two.fingerprint())
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.fingerprint(), two.fingerprint())
    for bank in (one, two):
        push_images(bank, 5, 20)
    assert torch.equal(one.fingerprint(), two.fingerprint())
    assert torch.equal(one.view()["patches"], two.view()["patches"])
    fifo = FeatureBank(BankSpec(2 * CLASSES, {"image": 5, "patches": (4, 5)}, torch.bfloat16))
    with pytest.raises(ValueError, match="resume with the same settings"):
        fifo.load_state_dict(one.state_dict())


@pytest.mark.parametrize("layout,classes", [("per_class", 0), ("fifo", 3)])
def test_classes_must_fit_the_layout(layout: Literal["fifo", "per_class"], classes: int) -> None:
    with pytest.raises(ValueError, match=rf"with layout '{layout}', got {classes}"):
        FeatureBank(BankSpec(4, {"image": 5}, layout=layout, classes=classes))


def test_a_sharded_ring_must_divide() -> None:
    spec = BankSpec(5, {"image": 5}, scope="sharded")
    with pytest.raises(ValueError, match="multiple of the 2 ranks; got 5: take 6"):
        FeatureBank(spec, ranks=Ranks(0, 2, 0))
    assert len(FeatureBank(spec).view().labels) == spec.slots  # on a single rank there is nothing to divide


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("layout, classes", [("fifo", 0), ("per_class", 6)])
def test_memory_of_a_sharded_bank(layout: Literal["fifo", "per_class"], classes: int, world: int) -> None:
    """Falls as 1 / world; of rings, whole ones: C / world, rounded up."""
    spec = BankSpec(24, {"image": 5, "patches": (4, 5)}, layout=layout, classes=classes, scope="sharded")
    whole = storage_bytes(FeatureBank(spec))
    for rank in range(world):
        part = storage_bytes(FeatureBank(spec, ranks=Ranks(rank, world, rank)))
        assert part == (whole // world if layout == "fifo" else whole * -(-classes // world) // classes)


def storage_bytes(bank: FeatureBank) -> int:
    return sum(rows.untyped_storage().nbytes() for rows in bank.view().fields.values())


def test_rings_of_a_sharded_bank() -> None:
    """Class c lies on rank c modulo 3, ring c // 3."""
    spec = BankSpec(2, {"image": 5}, layout="per_class", classes=5, scope="sharded")
    labels = torch.tensor([[-1, 0, 1], [2, 3, 4], [5, 6, 7]])
    found = [FeatureBank(spec, ranks=Ranks(rank, 3, rank)).rings(labels).tolist() for rank in range(3)]
    assert found == [
        [[-1, 0, -1], [-1, 1, -1], [-1, -1, -1]],
        [[-1, -1, 0], [-1, -1, 1], [-1, -1, -1]],
        [[-1, -1, -1], [0, -1, -1], [-1, -1, -1]],
    ]
