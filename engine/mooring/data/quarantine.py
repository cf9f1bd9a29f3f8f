"""Why a file is not part of a manifest."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Reason(StrEnum):
    """Why the scan left a file out; the text is what ``quarantine.csv`` holds."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not an image"
    UNSUPPORTED = "unsupported format"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_LARGE = "too large"
    DUPLICATE = "duplicate"
    DUPLICATE_ACROSS = "duplicate across splits"
    OUTSIDE_ROOT = "outside the root"
    SYMLINK_OUTSIDE = "symlink leaving the root"
    MISSING = "missing"
    UNREADABLE = "unreadable"
    BAD_LABEL = "bad label"
    BAD_NAME = "bad name"


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One file that was left out: its path as listed, the reason, and what exactly was seen."""

    path: str
    reason: Reason
    detail: str = ""


class ImageProblem(Exception):
    """An image that cannot be used; caught by the scan and by the sources, never shown as such."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def write_quarantine(file: Path, rows: Iterable[Quarantined]) -> None:
    """Writes ``path,reason,detail``; bytes of a name that are not UTF-8 appear as escapes."""
    with file.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        writer = csv.writer(stream)
        writer.writerow(("path", "reason", "detail"))
        writer.writerows((row.path, row.reason.value, row.detail) for row in rows)


def read_quarantine(file: Path) -> list[Quarantined]:
    """Reads what ``write_quarantine`` wrote; a missing file is an empty list."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return [
            Quarantined(row["path"], Reason(row["reason"]), row["detail"]) for row in csv.DictReader(stream)
        ]
