"""Banks for another number of ranks: every row where its slot, its class or its age puts it."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mooring.distributed import Ranks
from mooring.methods.bank import BankSpec, FeatureBank
from mooring.methods.bank_resharding import heirs, resharded_bank

WIDTH = 3


def filled(spec: BankSpec, rows: list[int], classes: int = 3) -> FeatureBank:
    """A bank that saw rows with these ids, each of its own direction."""
    bank = FeatureBank(spec)
    for begin in range(0, len(rows), 4):
        ids = torch.tensor(rows[begin : begin + 4])
        fields = torch.stack([ids.cos(), ids.sin(), torch.ones(len(ids))], 1)
        bank.push({"f": fields}, ids % classes, ids)
    return bank


def share(state: dict[str, Any], spec: BankSpec, rank: int, world: int) -> dict[str, Any]:
    """A rank's part of a whole bank, by the definition of ``sharded``."""
    if spec.layout == "fifo":
        return state | {
            "labels": state["labels"][rank::world],
            "ids": state["ids"][rank::world],
            "fields": {name: rows[rank::world] for name, rows in state["fields"].items()},
        }
    missing = -spec.classes % world  # rings of no class

    def rings(rows: torch.Tensor, empty: int) -> torch.Tensor:
        each = rows.view(spec.classes, -1, *rows.shape[1:])
        each = torch.cat([each, each.new_full((missing, *each.shape[1:]), empty)])
        return each[rank::world].flatten(0, 1)

    return state | {
        "labels": rings(state["labels"], -1),
        "ids": rings(state["ids"], -1),
        "fields": {name: rings(rows, 0) for name, rows in state["fields"].items()},
        "class_heads": rings(state["class_heads"], 0),
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys() and (one["head"], one["filled"]) == (other["head"], other["filled"])
    for key in ("labels", "ids", "class_heads"):
        assert torch.equal(one[key], other[key]), key
    assert all(torch.equal(one["fields"][name], other["fields"][name]) for name in other["fields"])


@pytest.mark.parametrize("layout", ["fifo", "per_class"])
@settings(max_examples=25, deadline=None)
@given(before=st.sampled_from([1, 2, 4]), now=st.sampled_from([1, 2, 4]), pushed=st.integers(0, 40))
def test_a_sharded_bank_keeps_every_row_and_its_order(
    layout: Literal["fifo", "per_class"], before: int, now: int, pushed: int
) -> None:
    classes = 5 if layout == "per_class" else 0
    spec = BankSpec(8, {"f": WIDTH}, layout=layout, classes=classes, scope="sharded")
    whole = filled(spec, list(range(pushed)), 5).state_dict()
    states = [share(whole, spec, rank, before) for rank in range(before)]
    for rank in range(now):
        assert_same(resharded_bank(spec, Ranks(rank, now), states), share(whole, spec, rank, now))


def test_a_gathered_bank_is_the_same_one() -> None:
    spec = BankSpec(8, {"f": WIDTH})
    state = filled(spec, list(range(11))).state_dict()
    assert resharded_bank(spec, Ranks(1, 4), [state, state]) is state


@pytest.mark.parametrize(
    "before, now, whose",
    [
        (4, 2, [[0, 1], [2, 3]]),
        (2, 1, [[0, 1]]),
        (3, 2, [[0], [1, 2]]),
        (1, 2, [[0], [0]]),
        (2, 4, [[0], [0], [1], [1]]),
        (2, 3, [[0], [0], [1]]),
    ],
)
def test_each_private_bank_has_heirs(before: int, now: int, whose: list[list[int]]) -> None:
    assert [list(heirs(before, Ranks(rank, now))) for rank in range(now)] == whose


@pytest.mark.parametrize("layout", ["fifo", "per_class"])
@settings(max_examples=25, deadline=None)
@given(pushed=st.lists(st.integers(0, 20), min_size=2, max_size=3), more=st.integers(0, 9))
def test_private_banks_are_merged_by_age(
    layout: Literal["fifo", "per_class"], pushed: list[int], more: int
) -> None:
    """The newest of each rank in turn, as long as there is room; what is pushed later takes the place of the oldest."""
    classes, room = (3, 4) if layout == "per_class" else (0, 6)
    spec = BankSpec(room, {"f": WIDTH}, layout=layout, classes=classes, scope="private")
    seen = [[100 * rank + i for i in range(count)] for rank, count in enumerate(pushed)]
    state = resharded_bank(spec, Ranks(), [filled(spec, rows).state_dict() for rows in seen])
    bank = FeatureBank(spec)
    bank.load_state_dict(state)
    later = list(range(900, 900 + more))
    for row in later:
        ids = torch.tensor([row])
        bank.push({"f": torch.ones(1, WIDTH)}, ids % 3, ids)
    for label in range(3) if classes else [None]:
        own = [[i for i in rows if label is None or i % 3 == label] for rows in seen]
        newest = [rows[-1 - age] for age in range(21) for rows in own if age < len(rows)][:room]
        expected = [*reversed(newest), *(i for i in later if label is None or i % 3 == label)][-room:]
        view = bank.view()
        here = view.labels >= 0 if label is None else view.labels == label
        assert sorted(view.ids[here].tolist()) == sorted(expected)
    original = torch.cat([filled(spec, rows).view()["f"] for rows in seen])
    ids = torch.cat([filled(spec, rows).view().ids for rows in seen])
    for row, label, vector in zip(bank.view().ids, bank.view().labels, bank.view()["f"], strict=True):
        if 0 <= int(row) < 900:
            assert int(label) == int(row) % 3 and torch.equal(vector, original[ids == row][0])
