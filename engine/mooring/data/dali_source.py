"""The fast source: NVIDIA DALI decodes and augments, on CPU threads or (``mixed``) on the GPU.

Order, ids and every random number are those of the reference source; DALI gets them as explicit inputs and
draws nothing itself. Files are read here, so that a missing or changed one is named; pictures that DALI
might read differently from Pillow are decoded by Pillow and handed over uncompressed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mooring.data.augment import Augmentation
from mooring.data.batch import Batch, named_views
from mooring.data.dali_pipeline import build_pipeline, decodes, pipeline_inputs
from mooring.data.draws import draw
from mooring.data.images import encode_ppm
from mooring.data.manifest import Split
from mooring.data.order import BatchRequest
from mooring.data.prefetch import Prefetcher
from mooring.data.reading import decode_row, read_row
from mooring.data.source import BatchStream, EpochSource, describe
from mooring.errors import DataError, require

_BLACK_PIXEL = np.frombuffer(b"P6\n1 1\n255\n\0\0\0", np.uint8)


class DaliSource(EpochSource):
    """Decodes with DALI. ``workers`` are its threads; on a CUDA device JPEGs are decoded there."""

    kind = "dali"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require("nvidia.dali", needed_for="data.source=dali")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise DataError("expected a CUDA device for data.source=dali; torch sees none: use device=cpu")

    def _start(self, requests: Iterator[BatchRequest]) -> BatchStream:
        maker = _DaliBatches(
            self.split,
            self.augments,
            seed=self.seed,
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.device,
        )
        stream = Prefetcher(maker.run(requests))
        return _OnDevice(stream) if self.device.type == "cuda" else stream


@dataclass(slots=True)
class _InFlight:
    """A batch that the pipeline is working on; ``inputs`` starts with the encoded files."""

    request: BatchRequest
    ids: np.ndarray
    labels: np.ndarray
    inputs: list[Any]


class _DaliBatches:
    """Feeds a pipeline ahead of its outputs and turns those into batches."""

    def __init__(
        self,
        split: Split,
        augments: tuple[Augmentation, ...],
        *,
        seed: int,
        batch_size: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self._split, self._augments, self._seed = split, augments, seed
        self._batch_size, self._workers, self._device = batch_size, workers, device
        self._through_pillow: set[int] = set()
        self._in_flight: deque[_InFlight] = deque()
        self._again: deque[_InFlight] = deque()
        # CUDA: copies run on a stream of this thread's own, so that waiting for them never waits for training
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, requests: Iterator[BatchRequest]) -> Generator[Batch]:
        """The batches of ``requests``, in order; a data error comes after the batches before it."""
        failure: list[DataError] = []
        with ThreadPoolExecutor(self._workers, thread_name_prefix="mooring-read") as readers:

            def feed() -> list[Any]:
                # DALI calls this two batches ahead of what it hands out; StopIteration ends the run
                if self._again:
                    item = self._again.popleft()
                elif failure:
                    raise StopIteration
                else:
                    try:
                        item = self._prepare(next(requests), readers)
                    except DataError as err:
                        failure.append(err)
                        raise StopIteration from None
                self._in_flight.append(item)
                return item.inputs

            pipeline = self._build(feed)
            while True:
                try:
                    outputs = pipeline.run()
                except StopIteration:
                    break
                except Exception as err:  # DALI maps its errors onto several Python types
                    self._recover(err)
                    pipeline = self._build(feed)
                    continue
                yield self._batch(self._in_flight.popleft(), outputs)
        if failure:
            raise failure[0]

    def _build(self, feed: Callable[[], list[Any]]) -> Any:
        return build_pipeline(
            self._augments,
            feed,
            batch_size=self._batch_size,
            threads=self._workers,
            device=self._device,
        )

    def _prepare(self, request: BatchRequest, readers: ThreadPoolExecutor) -> _InFlight:
        ids, labels, sizes = describe(self._split, request.rows)
        inputs: list[Any] = [list(readers.map(self._encoded, request.rows.tolist()))]
        for view, augment in enumerate(self._augments):
            draws = draw(augment, sizes, ids, seed=self._seed, epoch=request.epoch, view=view)
            inputs.extend(pipeline_inputs(augment, draws).values())
        return _InFlight(request, ids, labels, inputs)

    def _encoded(self, row: int) -> np.ndarray:
        if row < 0:
            return _BLACK_PIXEL
        data = read_row(self._split, row)
        if not self._split.native[row] or row in self._through_pillow:
            data = encode_ppm(decode_row(self._split, row, data))
        return np.frombuffer(data, np.uint8)

    def _batch(self, item: _InFlight, outputs: Any) -> Batch:
        # DALI's dynamic executor gives each run buffers of its own, so the tensors need no copy
        if self._stream is None:
            images, *views = (torch.from_dlpack(out.as_tensor()).permute(0, 3, 1, 2) for out in outputs)
        else:
            with torch.cuda.stream(self._stream):
                images, *views = (
                    torch.from_dlpack(out.as_tensor()).clone().permute(0, 3, 1, 2) for out in outputs
                )
            self._stream.synchronize()
        return Batch(
            images,
            torch.from_numpy(item.labels),
            torch.from_numpy(item.ids),
            named_views(views),
        )

    def _recover(self, error: Exception) -> None:
        """Finds which picture ended the pipeline; goes on without DALI's decoder for it, or names it.

        DALI reports neither the sample nor the file in most cases, and its pipeline is dead afterwards.
        """
        suspects: set[int] = set()
        for item in self._in_flight:
            for row, encoded in zip(item.request.rows.tolist(), item.inputs[0], strict=True):
                if row < 0:
                    continue
                decode_row(self._split, row, read_row(self._split, row))  # raises with the file's name
                if (
                    self._split.native[row]
                    and row not in self._through_pillow
                    and not decodes(encoded, self._device)
                ):
                    suspects.add(row)
        if not suspects:
            raise self._unexplained(error) from error
        self._through_pillow |= suspects
        for item in self._in_flight:
            rows = item.request.rows.tolist()
            item.inputs[0] = [
                self._encoded(row) if row in suspects else encoded
                for row, encoded in zip(rows, item.inputs[0], strict=True)
            ]
        self._again.extendleft(reversed(self._in_flight))
        self._in_flight.clear()

    def _unexplained(self, error: Exception) -> DataError:
        """The failure of a pipeline whose pictures all decode, one by one, in DALI too."""
        rows = [row for item in self._in_flight for row in item.request.rows.tolist() if row >= 0]
        files = ", ".join(str(self._split.file(row)) for row in rows[:3]) + (" ..." if len(rows) > 3 else "")
        # its text is "Critical error in pipeline:", the graph's own lines, and after "encountered:" the reason
        reason = str(error).rpartition("encountered:")[2].strip() or type(error).__name__
        why = reason.splitlines()[0]
        return DataError(
            f"DALI stopped while it made {len(rows)} pictures that all decode one by one ({files}); it says: {why}: "
            f"lower data.workers or train.batch_size if memory is short, or read with data.source=torch"
        )


class _OnDevice:
    """Ties CUDA tensors made on the prefetch thread to the reader's stream, and moves labels and ids."""

    def __init__(self, batches: Prefetcher[Batch]) -> None:
        self._batches = batches

    def __next__(self) -> Batch:
        batch = next(self._batches)
        stream = torch.cuda.current_stream(batch.images.device)
        for images in (batch.images, *batch.views.values()):
            images.record_stream(stream)
        return batch.to(batch.images.device)

    def close(self) -> None:
        self._batches.close()
