"""The state of an optimizer on its way to another division among ranks: by parameter, element by element.

ZeRO steps flat tensors, each made of pieces of parameters. A saved state says which, so that the states of any number
of ranks, of any stage, become those of any other, or whole ones. Each target has values of its own, ``step`` too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """A run of elements of one parameter, in row-major order, and where it lies in a flat tensor."""

    name: str  # of the parameter
    start: int  # its first element in the parameter
    size: int
    offset: int  # its first element in the flat tensor


class Flat(NamedTuple):
    """A tensor that an optimizer steps: a parameter, or pieces of several ones."""

    group: int  # of the optimizer
    length: int
    pieces: Sequence[Piece]


def encode_pieces(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Pieces as a tree that a checkpoint can hold."""
    places = torch.tensor([piece[1:] for piece in pieces], dtype=torch.int64).reshape(-1, 3)
    return {"names": [piece.name for piece in pieces], "places": places}


def same_pieces(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two trees of ``encode_pieces`` are of the same pieces."""
    return one["names"] == other["names"] and torch.equal(one["places"], other["places"])


def _decode_pieces(tree: Mapping[str, Any]) -> list[Piece]:
    places = tree["places"].tolist()
    return [Piece(name, *place) for name, place in zip(tree["names"], places, strict=True)]


def group_numbers(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a saved state says of each parameter group: weight decay, momentum."""
    return [group.get("numbers", group) for group in state["groups"]]


def redistributed(
    saved: Iterable[Mapping[str, Any]], targets: Sequence[Flat], names: Sequence[str]
) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
    """Values of each target, from the states that all ranks of another run saved.

    Elements that nothing was saved for (parameters that have had no gradient) are zero. Where parameters of one target
    have taken different numbers of steps, their target has taken the most.

    Args:
        saved: of each rank, or the one whole state; read one after the other.
        targets: what the optimizer steps here.
        names: of all trained parameters, in the order of the groups.

    Returns:
        values by name, flat, of each target, empty where there were none; the numbers of each group.

    Raises:
        ValueError: a state does not say what it is made of, or lacks a parameter.
    """
    wanted: dict[str, list[tuple[int, Piece]]] = {}
    for index, flat in enumerate(targets):
        for piece in flat.pieces:
            wanted.setdefault(piece.name, []).append((index, piece))
    values: list[dict[str, Any]] = [{} for _ in targets]
    numbers: list[Mapping[str, Any]] = []
    seen: set[str] = set()
    for state in saved:
        numbers = numbers or group_numbers(state)
        for pieces, given in _flats(state, names):
            seen.update(piece.name for piece in pieces)
            own = dict(given) if any(piece.name in wanted for piece in pieces) else {}
            for piece in pieces:
                for index, target in wanted.get(piece.name, ()):
                    _copy_overlap(own, piece, values[index], target, targets[index].length)
    missing = [name for name in wanted if name not in seen]
    if missing:
        raise ValueError(
            f"the optimizer's state is of another model: it has nothing of {', '.join(missing[:5])}"
        )
    return values, numbers


def _flats(state: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[list[Piece], Mapping[str, Any]]]:
    """Pieces and values of each tensor of a saved state."""
    if "state" in state:  # whole parameters
        if len(state["state"]) != len(names):
            raise ValueError(
                f"the optimizer's state is of {len(state['state'])} parameters, this run trains {len(names)}"
            )
        for name, values in zip(names, state["state"], strict=True):
            count = max((v.numel() for k, v in (values or {}).items() if _is_by_element(k, v)), default=0)
            yield [Piece(name, 0, count, 0)], values or {}
        return
    for group in state["groups"]:
        if "pieces" not in group:
            raise ValueError(
                f"the optimizer's state is of ZeRO stage {state['stage']} on {state['world']} processes, and of a "
                "version that did not save which parameters it is made of: continue with the same stage and processes"
            )
        for pieces, values in zip(group["pieces"], group["states"], strict=True):
            yield _decode_pieces(pieces), values


def _is_by_element(key: str, value: Any) -> bool:
    """Whether it has a number for each element; a parameter without dimensions has one too."""
    return isinstance(value, Tensor) and key != "step"


def _copy_overlap(
    source: Mapping[str, Any], piece: Piece, target: dict[str, Any], own: Piece, length: int
) -> None:
    first = max(piece.start, own.start)
    count = min(piece.start + piece.size, own.start + own.size) - first
    if count <= 0:
        return
    for key, value in source.items():
        if _is_by_element(key, value):
            if key not in target:
                target[key] = torch.zeros(length, dtype=value.dtype)
            begin, here = piece.offset + first - piece.start, own.offset + first - own.start
            target[key][here : here + count] = value.reshape(-1)[begin : begin + count]
        elif isinstance(value, Tensor):
            target[key] = torch.maximum(target[key], value) if key in target else value.clone()
        elif value is not None and target.get(key) is not None:
            target[key] = max(target[key], value)
        else:
            target.setdefault(key, value)
