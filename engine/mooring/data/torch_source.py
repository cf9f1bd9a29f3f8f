"""The reference source: Pillow and NumPy, in this process or in the workers of a torch DataLoader."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mooring.data.augment import Augmentation
from mooring.data.batch import Batch, named_views
from mooring.data.draws import draw
from mooring.data.manifest import Split
from mooring.data.order import BatchRequest
from mooring.data.prefetch import Prefetcher
from mooring.data.reading import decode_row, read_row
from mooring.data.render import render
from mooring.data.source import BatchStream, EpochSource, describe
from mooring.data.worker_signals import end_with_parent, undisturbed_workers
from mooring.errors import DataError


class TorchSource(EpochSource):
    """Decodes with Pillow. ``workers`` are processes; 1 decodes on a thread of this process."""

    kind = "torch"

    def _start(self, requests: Iterator[BatchRequest]) -> BatchStream:
        maker = _BatchMaker(self.split, self.augments, self.seed)
        if self.workers == 1:
            return Prefetcher(_make_here(maker, requests, self.device))
        return _WorkerStream(maker, requests, self.workers, self.device)


class _BatchMaker(Dataset[Any]):
    """Request -> batch. A data error comes back as a value: a DataLoader would bury it in a traceback."""

    def __init__(self, split: Split, augments: tuple[Augmentation, ...], seed: int) -> None:
        self.split, self.augments, self.seed = split, augments, seed

    def __getitem__(self, request: BatchRequest) -> Batch | DataError:
        try:
            return self._make(request)
        except DataError as err:
            return err

    def _make(self, request: BatchRequest) -> Batch:
        ids, labels, sizes = describe(self.split, request.rows)
        draws = [
            draw(augment, sizes, ids, seed=self.seed, epoch=request.epoch, view=view)
            for view, augment in enumerate(self.augments)
        ]
        sides = [augment.input.size for augment in self.augments]
        pixels = [np.empty((len(ids), side, side, 3), np.float32) for side in sides]
        for i, row in enumerate(request.rows):
            image = self._picture(int(row))
            for view, augment, drawn in zip(pixels, self.augments, draws, strict=True):
                view[i] = render(image, augment, drawn, i)
        # [B, S, S, 3] in memory is exactly [B, 3, S, S] in channels_last
        images, *views = (torch.from_numpy(view).permute(0, 3, 1, 2) for view in pixels)
        return Batch(
            images,
            torch.from_numpy(labels),
            torch.from_numpy(ids),
            named_views(views),
        )

    def _picture(self, row: int) -> Image.Image:
        if row < 0:
            return Image.new("RGB", (1, 1))
        return decode_row(self.split, row, read_row(self.split, row))


def _make_here(
    maker: _BatchMaker, requests: Iterator[BatchRequest], device: torch.device
) -> Generator[Batch]:
    for request in requests:
        yield _unwrapped(maker[request]).to(device)


def _unwrapped(made: Batch | DataError) -> Batch:
    if isinstance(made, DataError):
        raise made
    return made


class _Requests:
    """The sampler of the DataLoader: hands out requests, in order."""

    def __init__(self, requests: Iterator[BatchRequest]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[BatchRequest]:
        return self.requests


def _as_made(made: Any) -> Any:
    return made


class _WorkerStream:
    """A DataLoader over requests: its workers make ahead, in order."""

    def __init__(
        self, maker: _BatchMaker, requests: Iterator[BatchRequest], workers: int, device: torch.device
    ) -> None:
        self._device = device
        loader = DataLoader(
            maker,
            batch_size=None,  # a request is a whole batch already
            sampler=_Requests(requests),
            num_workers=workers,
            collate_fn=_as_made,
            prefetch_factor=2,
            worker_init_fn=end_with_parent,
        )
        with undisturbed_workers():
            self._batches: Iterator[Any] | None = iter(loader)

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        try:
            made = next(self._batches)
        except RuntimeError as err:
            if "DataLoader worker" not in str(err):
                raise
            raise DataError(
                f"a process that prepares images is gone ({str(err).splitlines()[0]}): where memory ran out, take "
                "fewer data.workers or a smaller train.batch_size"
            ) from err
        return _unwrapped(made).to(self._device)

    def close(self) -> None:
        self._batches = None  # the DataLoader's iterator ends its workers when it goes
