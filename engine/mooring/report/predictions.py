"""Predicted classes of files, as CSV or JSON lines."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from mooring.errors import RunFolderError
from mooring.report.records import json_line, write_text_atomic

Ranked = Sequence[tuple[str, float]]  # class and probability, most likely first


def write_predictions(path: Path, files: Sequence[Path], ranked: Sequence[Ranked]) -> None:
    """Writes one line per file, in the form that ``path`` ends with.

    CSV has the columns ``file, class_1, probability_1, class_2, ...``; JSON lines have
    ``{"file": ..., "classes": [[name, probability], ...]}``.

    Raises:
        RunFolderError: ``path`` ends with neither .csv nor .jsonl, or cannot be written.
    """
    check_predictions_path(path)
    form = predictions_csv if path.suffix.lower() == ".csv" else predictions_jsonl
    try:
        write_text_atomic(path, form(files, ranked))
    except OSError as err:
        raise RunFolderError(f"--out: {path} cannot be written: {err.strerror}") from None


def check_predictions_path(path: Path) -> None:
    """Refuses before the work is done what ``write_predictions`` would refuse after it."""
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise RunFolderError(f"--out: expected a file ending with .csv or .jsonl, got {path}")
    if not path.parent.is_dir():
        raise RunFolderError(f"--out: expected a file in an existing folder, got {path}")


def predictions_csv(files: Sequence[Path], ranked: Sequence[Ranked]) -> str:
    """CSV with a header line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    width = max((len(classes) for classes in ranked), default=0)
    head = [f"{part}_{place + 1}" for place in range(width) for part in ("class", "probability")]
    writer.writerow(["file", *head])
    for file, classes in zip(files, ranked, strict=True):
        cells = [cell for name, share in classes for cell in (name, f"{share:.6f}")]
        writer.writerow([str(file), *cells])
    return text.getvalue()


def predictions_jsonl(files: Sequence[Path], ranked: Sequence[Ranked]) -> str:
    """One JSON object a line."""
    lines = [
        json_line({"file": str(file), "classes": list(classes)})
        for file, classes in zip(files, ranked, strict=True)
    ]
    return "".join(line + "\n" for line in lines)
