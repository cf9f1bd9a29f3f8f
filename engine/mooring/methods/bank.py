"""FeatureBank: the last K rows of features, with labels and ids, in a ring or in one ring per class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mooring.collectives import Pending, begin_gather_rows
from mooring.distributed import ALONE, Ranks
from mooring.methods.base import StateTree
from mooring_kernels import class_ring_push_, ring_push_

_KEYS = "labels and ids"  # no name of a field

Scope = Literal["gathered", "sharded", "private"]


@dataclass(frozen=True, slots=True)
class BankSpec:
    """Shape of a bank.

    Attributes:
        rows: K, capacity, of each class with layout "per_class"; 0 is an empty bank that every push leaves empty.
        fields: name -> row width D, or (P, D) for rows of P vectors, each normalised by itself.
        dtype: storage of the rows, float32 or bfloat16.
        normalise: rows are stored at unit length, ``v / max(norm(v), 1e-12)``; otherwise as they come.
        layout: "fifo", one ring for all rows; "per_class", a ring for each class.
        classes: C with layout "per_class", else 0.
        scope: whose rows it holds, where several ranks train together. "gathered": those of all ranks, the same bank
            on each; "sharded": those of all ranks, slot s of one ring on rank s modulo world, the ring of class c on
            rank c modulo world; "private": a rank's own. On a single rank they are one thing.
    """

    rows: int
    fields: Mapping[str, int | tuple[int, ...]]
    dtype: torch.dtype = torch.float32
    normalise: bool = True
    layout: Literal["fifo", "per_class"] = "fifo"
    classes: int = 0
    scope: Scope = "gathered"

    @property
    def slots(self) -> int:
        """Rows that the bank can hold in all."""
        return self.rows * self.classes if self.layout == "per_class" else self.rows

    def row_shape(self, field: str) -> tuple[int, ...]:
        width = self.fields[field]
        return (width,) if isinstance(width, int) else width


@dataclass(frozen=True, slots=True)
class BankView:
    """The bank's tensors in place (no copy): valid until the next push.

    Attributes:
        fields: name -> [slots, D] or [slots, P, D]; the rows of all fields at one index belong to one image.
        labels: [slots] int64; -1 marks an empty slot.
        ids: [slots] int64 manifest ids; -1 in empty slots.

    ``slots`` is K, or C K with a ring per class: class after class, so that ``view(C, K, ...)`` separates them. A rank
    has K / world of them where the bank is sharded, or the rings of C / world classes, rounded up.
    """

    fields: Mapping[str, Tensor]
    labels: Tensor
    ids: Tensor

    def __getitem__(self, field: str) -> Tensor:
        return self.fields[field]


class FeatureBank:
    """Rings of feature rows, normalised once, when they are stored.

    Not an ``nn.Module``: DDP would overwrite buffers from rank 0 on every forward, and DeepSpeed
    neither synchronises nor saves them per rank. A push never waits for the device: the write position of
    one ring is a host integer, those of a ring per class lie on the device, as the labels that decide them do.

    Args:
        spec: capacity, fields, storage dtype, layout, scope.
        device: where the rows lie.
        ranks: those that train together; a push is then an exchange that all of them make.

    Raises:
        ValueError: rows or classes are negative, or do not fit the layout or the number of ranks.
    """

    def __init__(self, spec: BankSpec, *, device: torch.device | str = "cpu", ranks: Ranks = ALONE) -> None:
        if spec.rows < 0:
            raise ValueError(f"bank rows must be >= 0, got {spec.rows}")
        if (spec.classes < 1) if spec.layout == "per_class" else (spec.classes != 0):
            wanted = ">= 1" if spec.layout == "per_class" else "0"
            raise ValueError(f"bank classes must be {wanted} with layout {spec.layout!r}, got {spec.classes}")
        if spec.scope == "sharded" and spec.layout == "fifo" and spec.rows % ranks.world:
            raise ValueError(
                f"a sharded bank's rows must be a multiple of the {ranks.world} ranks; got {spec.rows}: take "
                f"{-(-spec.rows // ranks.world) * ranks.world}"
            )
        # of one rank, all three scopes are private
        self.ranks = ALONE if spec.scope == "private" else ranks
        self._parts, self._part = (ranks.world, ranks.rank) if spec.scope == "sharded" else (1, 0)
        self.spec = spec
        self._rings = -(-spec.classes // self._parts)  # of a ring per class, those on this rank
        slots = self._rings * spec.rows if spec.layout == "per_class" else spec.rows // self._parts
        self._head = 0
        self._filled = 0
        self._fields = {
            name: torch.zeros(slots, *spec.row_shape(name), dtype=spec.dtype, device=device)
            for name in spec.fields
        }
        self._labels = torch.full((slots,), -1, dtype=torch.int64, device=device)
        # one more than there are slots: rows that a ring per class skips leave their id there
        self._all_ids = torch.full((slots + 1,), -1, dtype=torch.int64, device=device)
        self._ids = self._all_ids[:slots]
        self._class_heads = torch.zeros(self._rings, dtype=torch.int64, device=device)
        # by the labels' identity, which are held so that it stays theirs
        self._sent: dict[int, tuple[Tensor, dict[str, Pending]]] = {}

    def __len__(self) -> int:
        """Slots written so far, on all ranks (padding rows count in one ring: they take a slot and stay masked).

        With a ring per class this number lies on the device and is waited for, and where such a bank is sharded all
        ranks must ask.
        """
        if self.spec.layout == "per_class":
            filled = (self._labels >= 0).sum()
            return int(self.ranks.all_reduce_(filled) if self._parts > 1 else filled)
        return self._filled

    @property
    def divided(self) -> bool:
        """Whether other ranks hold other rows of one and the same bank."""
        return self._parts > 1

    def rings(self, labels: Tensor) -> Tensor:
        """Which ring of ``view`` holds each class, int64, -1 where none here does; of a bank with a ring per class.

        Args:
            labels: int64, any shape.
        """
        here = (labels >= 0) & (labels < self.spec.classes) & (labels % self._parts == self._part)
        return torch.where(here, labels // self._parts, -1)

    def push(
        self, fields: Mapping[str, Tensor], labels: Tensor, ids: Tensor, *, most: int | None = None
    ) -> tuple[int, int]:
        """Stores the rows at the next slots; the oldest rows fall out. With B > K the newest K stay, of each class
        with a ring per class. Of a shared bank: the rows of all ranks, rank after rank, which all push equally many.

        Args:
            fields: name -> [B, D] or [B, P, D] rows.
            labels: [B] int64; a row with label -1 takes a slot of the one ring and is masked everywhere; rings per
                class skip it, and any other label that is no class.
            ids: [B] int64.
            most: store only so many, the first ones; None: all.

        Returns:
            The first slot written and how many, counted round the ring. Rings per class may have written any slot:
            which ones is known on the device.

        Raises:
            ValueError: a field is missing, unknown, or has another width.
        """
        if set(fields) != set(self._fields):
            raise ValueError(f"bank holds the fields {sorted(self._fields)}, got {sorted(fields)}")
        rows = self.spec.rows
        if rows == 0 or labels.shape[0] == 0:
            return 0, 0
        if self.ranks.world > 1:
            fields, labels, ids = self._gathered(fields, labels, ids)
        if most is not None:
            fields = {name: values[:most] for name, values in fields.items()}
            labels, ids = labels[:most], ids[:most]
        if self.spec.layout == "per_class":
            self._push_by_class(fields, labels, ids)
            return 0, len(self._labels)
        if self._parts > 1:
            return self._push_own_slots(fields, labels, ids)
        names = list(self._fields)
        head = self._head
        self._head = ring_push_(
            [self._fields[n] for n in names],
            self._labels,
            [fields[n].detach() for n in names],
            labels,
            head,
            normalise=self.spec.normalise,
        )
        batch = min(rows, ids.shape[0])
        # the slot of the newest row is head + B - 1, whatever B: the kept rows end there
        first = head + ids.shape[0] - batch
        slots = (first + torch.arange(batch, device=ids.device)) % rows
        self._ids[slots] = torch.where(labels >= 0, ids, -1)[-batch:]
        self._filled = min(rows, self._filled + ids.shape[0])
        return first % rows, batch

    def send(self, fields: Mapping[str, Tensor], labels: Tensor, ids: Tensor) -> None:
        """Begins the exchange of rows that a later ``push`` with these labels stores: beside the backward pass.

        Args:
            fields, labels, ids: as for ``push``.
        """
        if self.ranks.world > 1 and self.spec.rows > 0 and labels.shape[0] > 0:
            self._sent[id(labels)] = labels, self._begin(fields, labels, ids)

    def forget_sent(self) -> None:
        """Drops rows that were sent and never pushed, as where a step was left out."""
        for _, pending in self._sent.values():
            for part in pending.values():
                part.wait()
        self._sent = {}

    def _begin(self, fields: Mapping[str, Tensor], labels: Tensor, ids: Tensor) -> dict[str, Pending]:
        # in fp32: rounding to bf16 comes after the normalisation, as on a single rank
        rows = {name: fields[name].detach().float() for name in self._fields}
        rows[_KEYS] = torch.stack([labels, ids], 1)
        return {name: begin_gather_rows(values, self.ranks, "bank rows") for name, values in rows.items()}

    def _gathered(
        self, fields: Mapping[str, Tensor], labels: Tensor, ids: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The rows of all ranks."""
        _, pending = self._sent.pop(id(labels), (labels, None))
        every = {name: part.wait() for name, part in (pending or self._begin(fields, labels, ids)).items()}
        keys = every.pop(_KEYS)
        return every, keys[:, 0].contiguous(), keys[:, 1].contiguous()

    def _push_own_slots(self, fields: Mapping[str, Tensor], labels: Tensor, ids: Tensor) -> tuple[int, int]:
        """Of the rows of all ranks, those whose slot of the whole ring is this rank's: every world-th."""
        world, rows = self._parts, self.spec.rows
        first = (self.ranks.rank - self._head) % world
        own = slice(first, None, world)
        count = len(range(first, labels.shape[0], world))
        slot = (self._head + first) % rows // world
        self._head = (self._head + labels.shape[0]) % rows
        self._filled = min(rows, self._filled + labels.shape[0])
        if count == 0:
            return slot, 0
        names, room = list(self._fields), rows // world
        ring_push_(
            [self._fields[n] for n in names],
            self._labels,
            [fields[n][own].contiguous() for n in names],
            labels[own].contiguous(),
            slot,
            normalise=self.spec.normalise,
        )
        kept = min(room, count)
        begin = slot + count - kept
        slots = (begin + torch.arange(kept, device=ids.device)) % room
        self._ids[slots] = torch.where(labels[own] >= 0, ids[own], -1)[-kept:]
        return begin % room, kept

    def _push_by_class(self, fields: Mapping[str, Tensor], labels: Tensor, ids: Tensor) -> None:
        rings = self._rings, self.spec.rows
        slots = class_ring_push_(
            [rows.unflatten(0, rings) for rows in self._fields.values()],
            self._labels.view(rings),
            self._class_heads,
            [fields[name].detach() for name in self._fields],
            self.rings(labels) if self._parts > 1 else labels,
            normalise=self.spec.normalise,
        )
        if self._parts > 1:  # a written slot got the number of its ring
            ring = torch.arange(len(self._labels), device=labels.device) // self.spec.rows
            self._labels.copy_(torch.where(self._labels >= 0, ring * self._parts + self._part, -1))
        self._all_ids[torch.where(slots >= 0, slots, len(self._labels))] = ids

    def view(self) -> BankView:
        return BankView(self._fields, self._labels, self._ids)

    def fingerprint(self) -> Tensor:
        """[2] int64 on the device: a position-weighted sum over labels, ids and heads, and one over the rows' bits.

        Equal banks have equal fingerprints; used to compare ranks without gathering banks.
        """
        place = torch.arange(1, len(self._labels) + 1, device=self._labels.device)
        keys = ((self._labels + 2) * 1_000_003 + self._ids + 2) * place
        bits = torch.zeros((), dtype=torch.int64, device=self._labels.device)
        for rows in self._fields.values():
            words = rows.view(torch.int32 if rows.dtype == torch.float32 else torch.int16)
            bits = bits * 31 + (words.flatten(1).sum(1, dtype=torch.int64) * place).sum()
        return torch.stack([keys.sum() + self._head_key(), bits])

    def _head_key(self) -> Tensor:
        """Where the next rows go, by class: banks that hold the same rows may differ in nothing else."""
        place = torch.arange(1, self._rings + 1, device=self._labels.device)
        return 1_000_033 * ((self._class_heads + 1) * place).sum()

    def state_dict(self) -> StateTree:
        return {
            "head": self._head,
            "filled": self._filled,
            "class_heads": self._class_heads.clone(),
            "labels": self._labels.clone(),
            "ids": self._ids.clone(),
            "fields": {name: rows.clone() for name, rows in self._fields.items()},
        }

    def load_state_dict(self, state: StateTree) -> None:
        """Restores a saved bank bit for bit.

        Raises:
            ValueError: the saved bank has another shape, dtype or other fields.
        """
        saved, here = (
            {n: (tuple(t.shape), t.dtype) for n, t in (*fields.items(), ("class heads", heads))}
            for fields, heads in (
                (state["fields"], state["class_heads"]),
                (self._fields, self._class_heads),
            )
        )
        if saved != here:
            raise ValueError(
                f"the saved bank holds {saved}, this run needs {here}: resume with the same settings"
            )
        for name, rows in self._fields.items():
            rows.copy_(state["fields"][name])
        self._labels.copy_(state["labels"])
        self._ids.copy_(state["ids"])
        self._class_heads.copy_(state["class_heads"])
        self._head, self._filled = int(state["head"]), int(state["filled"])
