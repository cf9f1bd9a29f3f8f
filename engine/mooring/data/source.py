"""What both sources share: epochs, resuming, closing. A source adds only how a batch is made."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch

from mooring.data.augment import Augmentation
from mooring.data.batch import Batch
from mooring.data.manifest import Split
from mooring.data.order import BatchRequest, EpochOrder
from mooring.errors import DataError

_STATE_VERSION = 1


class BatchStream(Protocol):
    """Batches being made ahead, in order."""

    def __next__(self) -> Batch: ...

    def close(self) -> None: ...


class EpochSource(ABC):
    """Batches of one split, one epoch per ``iter()``; see ``mooring.data.batch.DataSource``.

    Nothing is read and no thread, process or pipeline is started before the first batch is asked for.
    Batches are made ahead; the state counts only those that were handed out.

    Args:
        split: rows, from ``Manifest.split``.
        augment: what is done to each picture.
        batch_size: rows per batch on this rank; every batch has that many.
        training: shuffle each epoch, go on into the next epoch without a pause.
        seed: of order and augmentation.
        rank, world: this process and how many share the split.
        workers: threads or processes that decode; batches do not depend on it.
        views: augmentations of further views of each picture, ``view1`` to ``view<n>``, each drawn independently.
        device: where the batches lie.
        drop_last: leave out the incomplete last batch instead of padding it; None: when training.
        interleaved: how rows are dealt out to ranks, see ``EpochOrder``.

    Raises:
        DataError: a number is out of range, or no full batch can be made.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        split: Split,
        augment: Augmentation,
        *,
        batch_size: int,
        training: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 1,
        views: Sequence[Augmentation] = (),
        device: torch.device | str = "cpu",
        drop_last: bool | None = None,
        interleaved: bool = False,
    ) -> None:
        if workers < 1:
            raise DataError(f"expected workers >= 1; got {workers}")
        self.split, self.augment, self.training = split, augment, training
        self.workers, self.views, self.device = workers, tuple(views), torch.device(device)
        self._order = EpochOrder(
            len(split),
            batch_size,
            seed=seed,
            shuffle=training,
            drop_last=training if drop_last is None else drop_last,
            rank=rank,
            world=world,
            interleaved=interleaved,
        )
        self._epoch, self._position = 0, 0
        self._stream: BatchStream | None = None
        self._stop_stream: weakref.finalize | None = None
        self._readers = 0

    @property
    def epoch(self) -> int:
        """Index of the epoch that the next batch belongs to."""
        return self._epoch

    @property
    def position(self) -> int:
        """Index within its epoch of the next batch."""
        return self._position

    @property
    def seed(self) -> int:
        """Seed of order and augmentation."""
        return self._order.seed

    @property
    def batch_size(self) -> int:
        """Rows per batch on this rank."""
        return self._order.batch_size

    @property
    def augments(self) -> tuple[Augmentation, ...]:
        """Of the image itself, then of each further view."""
        return (self.augment, *self.views)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        self._readers += 1
        return self._rest_of_epoch(self._readers)

    def _rest_of_epoch(self, reader: int) -> Iterator[Batch]:
        epoch = self._epoch
        while self._epoch == epoch:
            if reader != self._readers:
                raise RuntimeError("this iterator is stale: iter() was called again on its source")
            batch = self._next()
            # moved on before the batch is handed out: a state taken while it is in use names the next one
            self._position += 1
            if self._position == len(self):
                self._epoch, self._position = self._epoch + 1, 0
                if not self.training:
                    self._stop()
            yield batch

    def _next(self) -> Batch:
        if self._stream is None:
            requests = self._order.onward(self._epoch, self._position, endless=self.training)
            self._stream = self._start(requests)
            self._stop_stream = weakref.finalize(self, self._stream.close)
        try:
            return next(self._stream)
        except BaseException:
            self._stop()  # what was made ahead is lost, the place is not: the next call starts there again
            raise

    def _stop(self) -> None:
        if self._stop_stream is not None:
            self._stop_stream()
        self._stream, self._stop_stream = None, None

    @abstractmethod
    def _start(self, requests: Iterator[BatchRequest]) -> BatchStream:
        """Begins to make the batches of ``requests``, in order, in the background."""

    def state_dict(self) -> dict[str, Any]:
        """Where this source stands: plain numbers and strings, the same on every rank."""
        return {
            **self._identity(),
            "seed": self.seed,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state`` was taken; the state's seed is taken over.

        Raises:
            DataError: the state is of other data or other settings, so the batches could not be the same.
        """
        differences = [
            f"{name}: state has {state.get(name)!r}, this source {own!r}"
            for name, own in self._identity().items()
            if state.get(name) != own
        ]
        if differences:
            raise DataError(
                "expected a loader state of the same data and settings; got one that differs in\n  "
                + "\n  ".join(differences)
            )
        epoch, position, seed = (state.get(name) for name in ("epoch", "position", "seed"))
        if not (isinstance(epoch, int) and isinstance(position, int) and isinstance(seed, int)) or not (
            epoch >= 0 and 0 <= position < len(self)
        ):
            raise DataError(
                f"expected a place within {len(self)} batches; got epoch {epoch}, position {position}"
            )
        self._stop()
        self._readers += 1
        order = self._order
        self._order = EpochOrder(
            order.count,
            order.batch_size,
            seed=seed,
            shuffle=order.shuffle,
            drop_last=order.drop_last,
            rank=order.rank,
            world=order.world,
            interleaved=order.interleaved,
        )
        self._epoch, self._position = epoch, position

    def resharded_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The same place, where another number of ranks saved it: their batches together were as large.

        Raises:
            DataError: they were not.
        """
        saved, own = state["batch_size"] * state["world"], self.batch_size * self._order.world
        if saved != own:
            raise DataError(
                f"expected a loader state of batches of {own} rows on all processes together; got {saved}: keep "
                "train.batch_size (and method.source_batch_size), which count the images of all processes"
            )
        return {**state, "batch_size": self.batch_size, "world": self._order.world}

    def _identity(self) -> dict[str, Any]:
        """What must agree for a state to mean the same batches."""
        return {
            "version": _STATE_VERSION,
            "kind": self.kind,
            "data": self.split.digest,
            "augment": self.augment.fingerprint,
            "batch_size": self.batch_size,
            "world": self._order.world,
            "training": self.training,
            "drop_last": self._order.drop_last,
            "interleaved": self._order.interleaved,
            "views": [view.fingerprint for view in self.views],
        }

    def rewind(self) -> None:
        """Back to the first batch of the current epoch: for a pass that must be whole, whatever came before."""
        self._stop()
        self._readers += 1
        self._position = 0

    def close(self) -> None:
        """Ends threads and processes; the source can be used again and goes on where it stood."""
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def describe(split: Split, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, labels and sizes of a batch; padding rows have -1, -1 and 1 x 1 (a black pixel stands in).

    Returns:
        [B] int64, [B] int64, [B, 2] int64.
    """
    padding = rows < 0
    ids = np.where(padding, -1, split.ids[rows])
    labels = np.where(padding, -1, split.labels[rows])
    sizes = np.where(padding[:, None], 1, split.sizes[rows])
    return ids, labels, sizes
