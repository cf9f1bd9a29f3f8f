"""An optimizer's state between divisions: every element where it belongs, nothing shared, nothing guessed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mooring.train.optimizer_pieces import Flat, Piece, encode_pieces, redistributed
from mooring.train.optimizer_state import load_whole_state, optimizer_state

NAMES = ["a", "b", "c", "d"]


def cut(sizes: list[int], parts: int, alignment: int, order: list[int]) -> list[list[Piece]]:
    """Parameters one after the other in a flat tensor that is padded and cut into equal parts, as ZeRO 1 does it."""
    length = math.ceil(sum(sizes) / (parts * alignment)) * alignment
    found: list[list[Piece]] = [[] for _ in range(parts)]
    place = 0
    for index in order:
        for part in range(parts):
            first = max(place, part * length)
            end = min(place + sizes[index], (part + 1) * length)
            if first < end:
                found[part].append(Piece(NAMES[index], first - place, end - first, first - part * length))
        place += sizes[index]
    return found


def saved(values: dict[str, torch.Tensor], pieces: list[Piece], step: float) -> dict[str, Any]:
    """One rank's state; what is padding is not a number."""
    length = max((piece.offset + piece.size for piece in pieces), default=0) + 2
    flat = torch.full((length,), torch.nan)
    for name, start, size, offset in pieces:
        flat[offset : offset + size] = values[name][start : start + size]
    state = {"exp_avg": flat, "exp_avg_sq": 2 * flat, "step": torch.tensor(step)}
    groups = [{"numbers": {"weight_decay": 0.1}, "states": [state], "pieces": [encode_pieces(pieces)]}]
    return {"groups": groups, "stage": 1, "world": 0}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.permutations(range(4)),
)
def test_every_element_gets_to_its_place(
    sizes: list[int], before: int, now: int, alignment: int, order: list[int]
) -> None:
    values = {
        name: 100.0 * i + torch.arange(size) for i, (name, size) in enumerate(zip(NAMES, sizes, strict=True))
    }
    parts = [saved(values, pieces, 5.0) for pieces in cut(sizes, before, alignment, order)]
    targets = [
        Flat(0, max((p.offset + p.size for p in pieces), default=0), pieces)
        for pieces in cut(sizes, now, 1, list(range(4)))
    ]
    found, numbers = redistributed(iter(parts), targets, NAMES)
    assert numbers == [{"weight_decay": 0.1}]
    for target, own in zip(targets, found, strict=True):
        for name, start, size, offset in target.pieces:
            expected = values[name][start : start + size]
            assert torch.equal(own["exp_avg"][offset : offset + size], expected)
            assert torch.equal(own["exp_avg_sq"][offset : offset + size], 2 * expected)
            assert own["step"] == 5.0
    steps = [own["step"].data_ptr() for own in found if own]
    assert len(set(steps)) == len(steps)


def trained(shapes: list[tuple[int, ...]], rates: list[float]) -> tuple[list[torch.nn.Parameter], Any]:
    torch.manual_seed(3)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    groups = [{"params": [p], "weight_decay": rate} for p, rate in zip(parameters, rates, strict=True)]
    return parameters, torch.optim.AdamW(groups, lr=0.1)


def test_whole_states_equal_those_of_an_optimizer_that_was_never_divided() -> None:
    shapes: list[tuple[int, ...]] = [(3, 4), (), (5,), (2, 2, 3)]
    sizes = [math.prod(shape) for shape in shapes]
    parameters, optimizer = trained(shapes, [0.1, 0.2, 0.3, 0.4])
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    parts = []
    for pieces in cut(sizes, 3, 2, [2, 0, 3, 1]):
        rows = {key: torch.full((40,), torch.nan) for key in ("exp_avg", "exp_avg_sq")}
        for name, start, size, offset in pieces:
            state = optimizer.state[parameters[NAMES.index(name)]]
            for key, flat in rows.items():
                flat[offset : offset + size] = state[key].flatten()[start : start + size]
        groups = [
            {"numbers": {"weight_decay": rate}, "states": [], "pieces": []} for rate in (0.1, 0.2, 0.3, 0.4)
        ]
        groups[0] |= {
            "states": [rows | {"step": torch.tensor(3.0)}],
            "pieces": [encode_pieces(pieces)],
        }
        parts.append({"groups": groups, "stage": 2, "world": 3})
    fresh, other = trained(shapes, [9.0, 9.0, 9.0, 9.0])
    load_whole_state(other, parts, NAMES)
    for own, p, q in zip(other.param_groups, fresh, parameters, strict=True):
        for key, value in optimizer.state[q].items():
            assert torch.equal(other.state[p][key], value), key
        assert own["weight_decay"] in (0.1, 0.2, 0.3, 0.4)
    assert [group["weight_decay"] for group in other.param_groups] == [0.1, 0.2, 0.3, 0.4]
    assert len({state["step"].data_ptr() for state in other.state.values()}) == len(parameters)


def test_parameters_without_a_state_have_none() -> None:
    parameters, optimizer = trained([(3,), (2,)], [0.1, 0.1])
    parameters[0].grad = torch.ones(3)
    optimizer.step()
    _, other = trained([(3,), (2,)], [0.1, 0.1])
    load_whole_state(other, [optimizer_state(optimizer)], ["a", "b"])
    assert len(other.state) == 1
    target = Flat(0, 5, [Piece("a", 0, 3, 0), Piece("b", 0, 2, 3)])
    (own,), _ = redistributed([optimizer_state(optimizer)], [target], ["a", "b"])
    assert own["step"] == 1 and own["exp_avg"][:3].abs().min() > 0 and not own["exp_avg"][3:].any()


def test_what_cannot_be_brought_over_is_refused() -> None:
    pieces = [Piece("a", 0, 3, 0)]
    state = saved({"a": torch.ones(3)}, pieces, 1.0)
    target = [Flat(0, 3, pieces), Flat(0, 2, [Piece("b", 0, 2, 0)])]
    with pytest.raises(ValueError, match="another model: it has nothing of b"):
        redistributed([state], target, ["a", "b"])
    del state["groups"][0]["pieces"]
    with pytest.raises(ValueError, match="did not save which parameters"):
        redistributed([state], target[:1], ["a"])
    with pytest.raises(ValueError, match="is of 3 parameters, this run trains 1"):
        redistributed([{"state": [None] * 3, "groups": []}], target[:1], ["a"])
    _, optimizer = trained([(3,), (2,)], [0.1, 0.1])
    with pytest.raises(ValueError, match="1 parameter groups, this run 2"):
        load_whole_state(
            optimizer,
            [saved({"a": torch.ones(3), "b": torch.ones(2)}, [*pieces, Piece("b", 0, 2, 3)], 1.0)],
            ["a", "b"],
        )
