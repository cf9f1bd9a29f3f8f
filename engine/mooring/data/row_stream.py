"""Rows of a training source without end, as many at a time as are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mooring.data.batch import Batch
from mooring.data.source import EpochSource


class RowStream:
    """Hands out the rows of a source's batches in order, across batches and epochs; none is read and left out.

    Nothing is read before the first rows are asked for. The state is valid between any two calls.

    Args:
        source: a training source; its batches set how many rows are decoded at a time, not how many are taken.
    """

    def __init__(self, source: EpochSource) -> None:
        self.source = source
        self._batches: Iterator[Batch] = iter(())
        self._held: Batch | None = None
        self._before: dict[str, Any] = {}  # state of the source before the batch that is held
        self._used = 0  # rows of that batch (or, right after a load, of the next one) that were handed out

    def take(self, rows: int) -> Batch:
        """The next ``rows`` rows, images, labels and ids."""
        if rows < 1:
            raise ValueError(f"expected rows >= 1; got {rows}")
        parts: list[Batch] = []
        while rows:
            if self._held is None:
                self._held = self._draw()
            images, labels, ids = self._held.images, self._held.labels, self._held.ids
            chosen = slice(self._used, self._used + rows)
            parts.append(Batch(images[chosen], labels[chosen], ids[chosen]))
            taken = parts[-1].labels.shape[0]
            rows -= taken
            self._used += taken
            if self._used == labels.shape[0]:
                self._held, self._used = None, 0
        if len(parts) == 1:
            return parts[0]
        return Batch(
            torch.cat([part.images for part in parts]),
            torch.cat([part.labels for part in parts]),
            torch.cat([part.ids for part in parts]),
        )

    def _draw(self) -> Batch:
        self._before = self.source.state_dict()
        batch = next(self._batches, None)
        if batch is None:
            self._batches = iter(self.source)
            batch = next(self._batches)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: plain numbers and strings."""
        before = self.source.state_dict() if self._held is None else self._before
        return {"source": before, "used": self._used}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state`` was taken.

        Raises:
            DataError: the state is of other data or other settings.
        """
        self.source.load_state_dict(state["source"])
        self._batches, self._held, self._used = iter(()), None, int(state["used"])

    def resharded_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The same place, where another number of ranks saved it; rows that they cannot share are read again.

        Raises:
            DataError: as ``EpochSource.resharded_state``.
        """
        source = self.source.resharded_state(state["source"])
        return {"source": source, "used": state["used"] * state["source"]["world"] // source["world"]}

    def close(self) -> None:
        """Ends the background work; the stream goes on where it stood when it is used again."""
        self.source.close()
