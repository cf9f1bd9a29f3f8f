"""FeatureBank: the last K rows of features, with labels and ids, in a ring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mooring.methods.base import StateTree
from mooring_kernels import ring_push_


@dataclass(frozen=True, slots=True)
class BankSpec:
    """Shape of a bank.

    Attributes:
        rows: K, capacity; 0 is an empty bank that every push leaves empty.
        fields: name -> row width D.
        dtype: storage of the rows, float32 or bfloat16.
        normalise: rows are stored at unit length, ``v / max(norm(v), 1e-12)``; otherwise as they come.
    """

    rows: int
    fields: Mapping[str, int]
    dtype: torch.dtype = torch.float32
    normalise: bool = True


@dataclass(frozen=True, slots=True)
class BankView:
    """The bank's tensors in place (no copy): valid until the next push.

    Attributes:
        fields: name -> [K, D]; the rows of all fields at one index belong to one image.
        labels: [K] int64; -1 marks an empty slot.
        ids: [K] int64 manifest ids; -1 in empty slots.
    """

    fields: Mapping[str, Tensor]
    labels: Tensor
    ids: Tensor

    def __getitem__(self, field: str) -> Tensor:
        return self.fields[field]


class FeatureBank:
    """A FIFO ring of feature rows, normalised once, when they are stored.

    Not an ``nn.Module``: DDP would overwrite buffers from rank 0 on every forward, and DeepSpeed
    neither synchronises nor saves them per rank. The write position is a host integer, so a push
    never waits for the device.

    Args:
        spec: capacity, fields, storage dtype.
        device: where the rows lie.
    """

    def __init__(self, spec: BankSpec, *, device: torch.device | str = "cpu") -> None:
        if spec.rows < 0:
            raise ValueError(f"bank rows must be >= 0, got {spec.rows}")
        self.spec = spec
        self._head = 0
        self._filled = 0
        self._fields = {
            name: torch.zeros(spec.rows, width, dtype=spec.dtype, device=device)
            for name, width in spec.fields.items()
        }
        self._labels = torch.full((spec.rows,), -1, dtype=torch.int64, device=device)
        self._ids = torch.full((spec.rows,), -1, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        """Slots written so far, at most K (padding rows count: they take a slot and stay masked)."""
        return self._filled

    def push(self, fields: Mapping[str, Tensor], labels: Tensor, ids: Tensor) -> tuple[int, int]:
        """Stores the rows at the next slots; the oldest rows fall out. With B > K the newest K stay.

        Args:
            fields: name -> [B, D] rows.
            labels: [B] int64; a row with label -1 takes a slot and is masked everywhere.
            ids: [B] int64.

        Returns:
            The first slot written and how many, counted round the ring.

        Raises:
            ValueError: a field is missing, unknown, or has another width.
        """
        if set(fields) != set(self._fields):
            raise ValueError(f"bank holds the fields {sorted(self._fields)}, got {sorted(fields)}")
        rows = self.spec.rows
        if rows == 0 or labels.shape[0] == 0:
            return 0, 0
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

    def view(self) -> BankView:
        return BankView(self._fields, self._labels, self._ids)

    def fingerprint(self) -> Tensor:
        """[2] int64 on the device: a position-weighted sum over labels and ids, and one over the rows' bits.

        Equal banks have equal fingerprints; used to compare ranks without gathering banks.
        """
        place = torch.arange(1, self.spec.rows + 1, device=self._labels.device)
        keys = ((self._labels + 2) * 1_000_003 + self._ids + 2) * place
        bits = torch.zeros((), dtype=torch.int64, device=self._labels.device)
        for rows in self._fields.values():
            words = rows.view(torch.int32 if rows.dtype == torch.float32 else torch.int16).to(torch.int64)
            bits = bits * 31 + (words.sum(1) * place).sum()
        return torch.stack([keys.sum(), bits])

    def state_dict(self) -> StateTree:
        return {
            "head": self._head,
            "filled": self._filled,
            "labels": self._labels.clone(),
            "ids": self._ids.clone(),
            "fields": {name: rows.clone() for name, rows in self._fields.items()},
        }

    def load_state_dict(self, state: StateTree) -> None:
        """Restores a saved bank bit for bit.

        Raises:
            ValueError: the saved bank has another shape, dtype or other fields.
        """
        saved = {n: (tuple(t.shape), t.dtype) for n, t in state["fields"].items()}
        here = {n: (tuple(t.shape), t.dtype) for n, t in self._fields.items()}
        if saved != here:
            raise ValueError(
                f"the saved bank holds {saved}, this run needs {here}: resume with the same settings"
            )
        for name, rows in self._fields.items():
            rows.copy_(state["fields"][name])
        self._labels.copy_(state["labels"])
        self._ids.copy_(state["ids"])
        self._head, self._filled = int(state["head"]), int(state["filled"])
