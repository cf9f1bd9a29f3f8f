"""The run's numbers over time: append-only ``metrics.jsonl``, and the same as TensorBoard events.

A checkpoint holds how long these files were when it was taken. A continued run cuts them there and appends, so that
they read as those of a run that was never interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mooring.errors import RunFolderError
from mooring.parsing import parse_json
from mooring.report.records import from_json_number, json_line

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE_NAME = "metrics.jsonl"
DISCRIMINATION = "discrimination"  # kind of a line: what the encoder tells apart beyond the run's classes
_EVENTS = "tensorboard"


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the log.

    Attributes:
        kind: ``train`` (means since the last line), ``val``, ``test`` and ``test/NAME`` (one evaluation; NAME as in
            ``data.extra_test``), ``discrimination`` (at step 0 too, of the encoder as it began), ``note``.
        step: optimizer steps done.
        epoch: from 0.
        values: metric -> number; a note may hold text.
    """

    kind: str
    step: int
    epoch: int
    values: Mapping[str, Any]


class MetricsLog:
    """Writes one JSON object a line, each flushed, so that a killed run loses at most the line being written.

    Args:
        folder: the run folder; gets ``metrics.jsonl`` and ``tensorboard/``. What is there is appended to.
        tensorboard: also write TensorBoard events.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        self.folder = folder
        self.path = folder / FILE_NAME
        self._events_folder = folder / _EVENTS if tensorboard else None
        self._events: SummaryWriter | None = None
        if self.path.exists():
            _drop_partial_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, kind: str, *, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Appends one line. Non-finite numbers are written as ``"nan"``, ``"inf"`` and ``"-inf"``."""
        record = {"kind": kind, "step": step, "epoch": epoch, "values": values}
        self._file.write(json_line(record) + "\n")
        self._file.flush()
        if self._events_folder is not None and kind != "note":
            self._write_events(kind, step, values)

    def _write_events(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # a second or two: only where a line is written

            self._events = SummaryWriter(str(self._events_folder))
        for name, value in values.items():
            if isinstance(value, int | float):
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def lengths(self) -> dict[str, int]:
        """Bytes written so far to each file, by its path in the run folder; for ``cut_log``."""
        if self._events is not None:
            self._events.flush()
        return {name: (self.folder / name).stat().st_size for name in _log_files(self.folder)}

    def sync(self) -> None:
        """Waits until what was written is on the disk; may be called from another thread."""
        for name in _log_files(self.folder):
            descriptor = os.open(self.folder / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        """Closes the files; may be called twice."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class NoLog(MetricsLog):
    """Of the ranks that do not write: the same calls, and no file."""

    def __init__(self) -> None:
        pass

    def write(self, kind: str, *, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        pass

    def lengths(self) -> dict[str, int]:
        return {}

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def cut_log(folder: Path, lengths: Mapping[str, int]) -> list[str]:
    """Takes from the log of a run what came after a checkpoint: those steps are done again.

    Args:
        folder: the run folder.
        lengths: ``MetricsLog.lengths`` at the checkpoint; a file that is not in it is removed. Empty: the run starts
            from its beginning.

    Returns:
        what is missing, in words; empty where the log is whole.
    """
    missing = []
    for name in _log_files(folder):
        file = folder / name
        if name not in lengths:
            file.unlink()
        elif file.stat().st_size > lengths[name]:
            os.truncate(file, lengths[name])
    for name, length in lengths.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else 0
        if size < length:
            missing.append(f"{name} lacks its last {length - size} bytes: a part of the log is lost")
    return missing


def _log_files(folder: Path) -> list[str]:
    """The files of the log that are there, relative to the run folder."""
    events = sorted((folder / _EVENTS).glob("events.out.tfevents.*"))
    return [FILE_NAME] * (folder / FILE_NAME).is_file() + [f"{_EVENTS}/{file.name}" for file in events]


def read_metrics(path: Path) -> list[Record]:
    """The log of a run in order; ``path`` is the run folder or the file.

    A last line cut off by a crash is left out.

    Raises:
        RunFolderError: a line before the last is not a record, or the file cannot be read.
    """
    file = path / FILE_NAME if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as err:
        raise RunFolderError(f"{file}: expected the log of a run, got {err.strerror or err}") from None
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            entry = parse_json(line)
            values = {name: from_json_number(value) for name, value in entry["values"].items()}
            record = Record(entry["kind"], int(entry["step"]), int(entry["epoch"]), values)
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            if number == len(lines):  # no line end after it: the write was cut off
                break
            raise RunFolderError(
                f"{file}, line {number}: expected one metrics record, got {line[:80]!r}: the log is damaged; "
                "delete that line to read the rest"
            ) from err
        records.append(record)
    return records


def _drop_partial_line(path: Path) -> None:
    """Cuts what follows the last line end, so that an appended line starts on its own."""
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
