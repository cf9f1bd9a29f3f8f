"""Banks of a run that goes on with another number of ranks: where each saved row now belongs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mooring.distributed import Ranks
from mooring.methods.bank import BankSpec
from mooring.methods.base import StateTree


def resharded_bank(spec: BankSpec, ranks: Ranks, states: Sequence[StateTree]) -> StateTree:
    """This rank's state of a bank, from those that another number of ranks saved.

    - gathered: the same bank.
    - sharded: the same ring, slot s, or the ring of class s, on rank s modulo the number of ranks.
    - private: where there are fewer ranks than before, the newest rows of those that a rank stands for, in turn, as one
      ring that had seen the rows of all would hold; where there are more, a copy of one of theirs.

    Args:
        spec: of the bank.
        ranks: those that there are.
        states: of each rank that was, as ``FeatureBank.state_dict``.
    """
    if spec.scope == "gathered":
        return states[0]
    if spec.scope == "sharded":
        return _own_share(spec, ranks, states)
    chosen = [states[rank] for rank in heirs(len(states), ranks)]
    return chosen[0] if len(chosen) == 1 else _newest(spec, chosen)


def heirs(before: int, ranks: Ranks) -> range:
    """The ranks of ``before`` that this rank stands for: of fewer ranks, a share of them; of more, one."""
    first = ranks.rank * before // ranks.world
    return range(first, max(first + 1, (ranks.rank + 1) * before // ranks.world))


def _own_share(spec: BankSpec, ranks: Ranks, states: Sequence[StateTree]) -> StateTree:
    """Slot s, or the ring of class s, is number s // world of rank s % world, before and now."""
    before = len(states)
    per_class = spec.layout == "per_class"
    units, room = (spec.classes, spec.rows) if per_class else (spec.rows, 1)
    # ranks hold equally many: the last ones may have a ring of no class
    own = torch.arange(ranks.rank, -(-units // ranks.world) * ranks.world, ranks.world)

    def taken(parts: Iterable[Tensor], empty: int, rows: int = room) -> Tensor:
        found = None
        for rank, part in enumerate(parts):
            theirs = part.view(-1, rows, *part.shape[1:])
            if found is None:
                found = theirs.new_full((len(own), *theirs.shape[1:]), empty)
            mine = (own % before == rank) & (own < units)
            found[mine] = theirs[own[mine] // before]
        assert found is not None
        return found.flatten(0, 1)

    first = states[0]  # where the next row of one ring goes is said of the whole ring
    heads = first["class_heads"]
    return {
        **first,
        "class_heads": taken((state["class_heads"] for state in states), 0, 1) if per_class else heads,
        "labels": taken((state["labels"] for state in states), -1),
        "ids": taken((state["ids"] for state in states), -1),
        "fields": {name: taken((state["fields"][name] for state in states), 0) for name in spec.fields},
    }


def _newest(spec: BankSpec, states: Sequence[StateTree]) -> StateTree:
    """The newest rows of several rings, or of several rings of each class, oldest first from slot 0 on."""
    rings = max(1, spec.classes)
    room = spec.rows
    ages = torch.arange(room)

    def by_age(tensor: Tensor, heads: Tensor) -> Tensor:
        """[rings, K, ...], the newest row first."""
        order = (heads[:, None] - 1 - ages) % room
        rows = tensor.view(rings, room, *tensor.shape[1:])
        return rows[torch.arange(rings)[:, None], order]

    heads = [
        state["class_heads"] if spec.layout == "per_class" else torch.tensor([int(state["head"])])
        for state in states
    ]

    def in_turn(tensors: list[Tensor]) -> Tensor:
        """[rings, n K, ...]: the newest of each state, then the second newest, and so on."""
        aged = [by_age(tensor, own) for tensor, own in zip(tensors, heads, strict=True)]
        return torch.stack(aged, 2).flatten(1, 2)

    labels = in_turn([state["labels"] for state in states])
    filled = labels >= 0
    kept = filled.long().argsort(stable=True, dim=1, descending=True)[:, :room]  # empty slots last
    counts = filled.sum(1).clamp_max(room)
    # slot s holds the row of age count - 1 - s; empty slots stay behind
    age = counts[:, None] - 1 - ages
    age = torch.where(age >= 0, age, ages)
    picked = kept.gather(1, age)

    def taken(tensors: list[Tensor]) -> Tensor:
        return in_turn(tensors)[torch.arange(rings)[:, None], picked].flatten(0, 1)

    per_class = spec.layout == "per_class"
    first = states[0]
    return {
        "head": int(first["head"]) if per_class else int(counts[0]) % room,
        "filled": int(first["filled"]) if per_class else int(counts[0]),
        "class_heads": counts % room if per_class else first["class_heads"],
        "labels": taken([state["labels"] for state in states]),
        "ids": taken([state["ids"] for state in states]),
        "fields": {name: taken([state["fields"][name] for state in states]) for name in spec.fields},
    }
