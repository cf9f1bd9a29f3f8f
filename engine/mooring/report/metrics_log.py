"""The run's numbers over time: append-only ``metrics.jsonl``, and the same as TensorBoard events.

A checkpoint holds how long these files were when it was taken. A continued run cuts them there and appends, so that
they read as those of a run that was never interrupted.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mooring.errors import RunFolderError
from mooring.parsing import parse_json
from mooring.regular_file import open_own, read_regular
from mooring.report.event_file import PREFIX, EventFile
from mooring.report.records import from_json_number, json_line

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

    Raises:
        RunFolderError: a file of the log is a link, or no file.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        self.folder = folder
        self.path = folder / FILE_NAME
        self._events_folder = folder / _EVENTS if tensorboard else None
        self._events: EventFile | None = None
        if FILE_NAME in _log_files(folder):
            _drop_partial_line(self.path)
        self._file = os.fdopen(
            _opened(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", encoding="utf-8"
        )

    def write(self, kind: str, *, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Appends one line. Non-finite numbers are written as ``"nan"``, ``"inf"`` and ``"-inf"``."""
        record = {"kind": kind, "step": step, "epoch": epoch, "values": values}
        self._file.write(json_line(record) + "\n")
        self._file.flush()
        if self._events_folder is not None and kind != "note":
            self._write_events(self._events_folder, kind, step, values)

    def _write_events(self, folder: Path, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._events is None:
            self._events = EventFile(folder)
        for name, value in values.items():
            if isinstance(value, int | float):
                self._events.add_scalar(f"{kind}/{name}", value, step)
        self._events.flush()

    def lengths(self) -> dict[str, int]:
        """Bytes written so far to each file, by its path in the run folder; for ``cut_log``."""
        if self._events is not None:
            self._events.flush()
        return {name: (self.folder / name).stat().st_size for name in _log_files(self.folder)}

    def sync(self) -> None:
        """Waits until what was written is on the disk; may be called from another thread."""
        for name in _log_files(self.folder):
            descriptor = _opened(self.folder / name, os.O_RDONLY)
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

    Raises:
        RunFolderError: a file of the log is a link, which may lead to anything, or no file; nothing was changed.
    """
    missing = []
    for name in _log_files(folder):
        file = folder / name
        if name not in lengths:
            file.unlink()
        elif file.stat().st_size > lengths[name]:
            descriptor = _opened(file, os.O_WRONLY)
            try:
                os.ftruncate(descriptor, lengths[name])
            finally:
                os.close(descriptor)
    for name, length in lengths.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else 0
        if size < length:
            missing.append(f"{name} lacks its last {length - size} bytes: a part of the log is lost")
    return missing


def _log_files(folder: Path) -> list[str]:
    """The files of the log that are there, relative to the run folder.

    Raises:
        RunFolderError: one of them, or their folder, is a link, or no file.
    """
    log, events = folder / FILE_NAME, folder / _EVENTS
    if events.is_symlink():
        raise _refused(events, f"a symbolic link to {events.resolve()}")
    files = [log] * (log.exists() or log.is_symlink()) + sorted(events.glob(f"{PREFIX}*"))
    for file in files:
        if file.is_symlink():
            raise _refused(file, f"a symbolic link to {file.resolve()}")
        if not file.is_file():
            raise _refused(file, "not a regular file")
    return [file.relative_to(folder).as_posix() for file in files]


def _opened(file: Path, flags: int) -> int:
    try:
        return open_own(file, flags)
    except OSError as err:
        if err.errno in (errno.ELOOP, errno.EINVAL):
            raise _refused(file, str(err.strerror)) from None
        raise


def _refused(file: Path, got: str) -> RunFolderError:
    return RunFolderError(
        f"{file}: expected a file of the run itself, which is cut and written to; got {got}: put the file in its place"
    )


def read_metrics(path: Path) -> list[Record]:
    """The log of a run in order; ``path`` is the run folder or the file.

    A last line cut off by a crash is left out.

    Raises:
        RunFolderError: a line before the last is not a record, or the file cannot be read.
    """
    file = path / FILE_NAME if path.is_dir() else path
    try:
        lines = read_regular(file).decode("utf-8", "replace").split("\n")
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
    with os.fdopen(_opened(path, os.O_RDWR), "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
