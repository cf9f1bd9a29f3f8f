"""The records of a comparison: one JSON line per run; table and picture are drawn from them alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mooring.errors import RunFolderError
from mooring.parsing import parse_json
from mooring.regular_file import read_regular
from mooring.report.records import json_line, write_text_atomic

FILE_NAME = "records.jsonl"
Record = Mapping[str, Any]

_NEEDED = ("run", "role", "method", "shots", "fraction", "lr", "seed", "epochs", "val", "test", "settings")


def read_records(folder: Path) -> dict[str, Record]:
    """Run name -> record, in the order of the file; none where there is no file.

    Raises:
        RunFolderError: a line is damaged.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        return {}
    records: dict[str, Record] = {}
    # what is no UTF-8 is no JSON either, and is refused line by line
    for number, line in enumerate(read_regular(file).decode("utf-8", "replace").splitlines(), 1):
        try:
            record = parse_json(line)
            missing = [name for name in _NEEDED if name not in record]
        except (ValueError, TypeError) as err:
            raise RunFolderError(f"{file}:{number}: expected a record, got {err}") from None
        if missing:
            raise RunFolderError(f"{file}:{number}: expected a record, got one without {', '.join(missing)}")
        records[record["run"]] = record
    return records


def write_records(folder: Path, records: Iterable[Record]) -> None:
    """Replaces the file as a whole."""
    write_text_atomic(folder / FILE_NAME, "".join(json_line(record) + "\n" for record in records))


def differing_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Dotted names of the settings in which two runs differ; what only steers the display is left out."""
    return sorted(
        key
        for key in {**_flat(first), **_flat(second)}
        if key.partition(".")[0] not in ("out", "resume", "report")
        and key != "data.workers"
        and _flat(first).get(key) != _flat(second).get(key)
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
