"""Predicted classes of files, as CSV or JSON lines, each written as soon as it is known."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mooring.errors import RunFolderError
from mooring.report.records import json_line

Ranked = Sequence[tuple[str, float]]  # class and probability, most likely first


class PredictionWriter:
    """Writes one line per file, flushed, so that what was done stays where the rest fails.

    CSV has the columns ``file, class_1, probability_1, class_2, ...``; JSON lines have
    ``{"file": ..., "classes": [[name, probability], ...]}``.

    Args:
        file: where to write; a CSV gets its header at once.
        form: ``.csv`` or ``.jsonl``.
        top: classes per line.
    """

    def __init__(self, file: TextIO, form: str, top: int) -> None:
        self._file = file
        self._csv = form == ".csv"
        self.written = 0
        if self._csv:
            head = [f"{part}_{place + 1}" for place in range(top) for part in ("class", "probability")]
            self._line(_csv_line(["file", *head]))

    def write(self, file: Path, ranked: Ranked) -> None:
        """Adds one file's classes."""
        if self._csv:
            cells = [cell for name, share in ranked for cell in (name, f"{share:.6f}")]
            self._line(_csv_line([str(file), *cells]))
        else:
            self._line(json_line({"file": str(file), "classes": list(ranked)}) + "\n")
        self.written += 1

    def _line(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


def check_predictions_path(path: Path, *, overwrite: bool = False) -> None:
    """Refuses before the work is done what ``open_predictions`` would refuse after it.

    Raises:
        RunFolderError: ``path`` ends with neither .csv nor .jsonl, lies in no folder, or exists.
    """
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise RunFolderError(f"--out: expected a file ending with .csv or .jsonl, got {path}")
    if not path.parent.is_dir():
        raise RunFolderError(f"--out: expected a file in an existing folder, got {path}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise RunFolderError(f"--out: {path} exists: choose another name, or add --overwrite")


@contextmanager
def open_predictions(path: Path, top: int, *, overwrite: bool = False) -> Iterator[PredictionWriter]:
    """A writer of the form that ``path`` ends with. A file into which nothing came is taken away again.

    Raises:
        RunFolderError: as ``check_predictions_path``, or the file cannot be written.
    """
    check_predictions_path(path, overwrite=overwrite)
    try:
        file = path.open("w" if overwrite else "x", encoding="utf-8", newline="")
    except OSError as err:
        raise RunFolderError(f"--out: {path} cannot be written: {err.strerror}") from None
    with file:
        writer = PredictionWriter(file, path.suffix.lower(), top)
        try:
            yield writer
        except BaseException:
            if not writer.written:
                path.unlink(missing_ok=True)
            raise


def _csv_line(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
