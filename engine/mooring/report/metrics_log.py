"""The run's numbers over time: append-only ``metrics.jsonl``, and the same as TensorBoard events."""

from __future__ import annotations

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
_RESUMED = "resumed_at_step"


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
        folder: the run folder; gets ``metrics.jsonl`` and ``tensorboard/``.
        tensorboard: also write TensorBoard events.
        resume_step: optimizer steps done where an earlier log is continued. Lines of later steps stay in the
            file and are dropped by ``read_metrics``: those steps are done again.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False, resume_step: int | None = None) -> None:
        self.path = folder / FILE_NAME
        self._events_folder = folder / "tensorboard" if tensorboard else None
        self._events: SummaryWriter | None = None
        self._resume_step = resume_step
        if self.path.exists():
            _drop_partial_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        if resume_step is not None:
            self.write("note", step=resume_step, epoch=0, values={_RESUMED: resume_step})

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

            # TensorBoard's own form of dropping what is done again
            purge = None if self._resume_step is None else self._resume_step + 1
            self._events = SummaryWriter(str(self._events_folder), purge_step=purge)
        for name, value in values.items():
            if isinstance(value, int | float):
                self._events.add_scalar(f"{kind}/{name}", value, step)

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


def read_metrics(path: Path) -> list[Record]:
    """The log of a run in order; ``path`` is the run folder or the file.

    A last line cut off by a crash is left out, and so are lines of steps that a resumed run did again.

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
        if record.kind == "note" and _RESUMED in values:
            records = [earlier for earlier in records if earlier.step <= values[_RESUMED]]
        records.append(record)
    return records


def _drop_partial_line(path: Path) -> None:
    """Cuts what follows the last line end, so that an appended line starts on its own."""
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
