"""A TensorBoard event file whose name sorts behind those that are there, whatever the clock says."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path
from typing import Any

from mooring.regular_file import open_own

PREFIX = "events.out.tfevents."
_PLACE = re.compile(re.escape(PREFIX) + r"(\d{10})\..*")


class EventFile:
    """Scalars as TensorBoard reads them; a new file each.

    TensorBoard takes the files of a folder one after the other, in the order of their names, and these begin with the
    time. Where the clock was set back since the last file, the new one gets the number after that one's instead.

    Args:
        folder: made where it is not there.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        # a second or two
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        # protobuf makes their classes when they are imported
        self._event: Any = vars(event_pb2)["Event"]
        self._summary: Any = vars(summary_pb2)["Summary"]
        folder.mkdir(exist_ok=True)
        places = [int(found[1]) for file in folder.iterdir() if (found := _PLACE.fullmatch(file.name))]
        place = max([int(time.time()), *(known + 1 for known in places)])
        name = f"{PREFIX}{place:010d}.{platform.node()}.{os.getpid()}"
        descriptor = open_own(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._records = RecordWriter(os.fdopen(descriptor, "wb"))
        self._write(file_version="brain.Event:2")

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """One number; buffered until ``flush``."""
        shown = self._summary(value=[self._summary.Value(tag=tag, simple_value=float(value))])
        self._write(step=step, summary=shown)

    def _write(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())

    def flush(self) -> None:
        """Hands what was written to the system."""
        self._records.flush()

    def close(self) -> None:
        """Flushes and closes; may be called twice."""
        self._records.close()
