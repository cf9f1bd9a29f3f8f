"""The record files: one JSON object per line, appended, never edited. Everything shown is drawn from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "records"
PLOTS = Path(__file__).resolve().parent / "plots"
_ENVIRONMENTS = "environments.jsonl"
Record = dict[str, Any]


@dataclass(frozen=True)
class Times:
    """What decides between candidates: CPU time at one thread, the wall at more, events on a GPU."""

    seconds: dict[str, float]
    times_faster_than: dict[str, dict[str, float]]
    clock: str


def threads_of(record: Record) -> int:
    """Threads of a measurement; 0 on a GPU. The first records say it in their environment only: one."""
    return int(record.get("threads", 1)) if record["device"] == "cpu" else 0


def deciding(record: Record) -> Times:
    """The clock that a measurement is judged by."""
    if threads_of(record) > 1:
        return Times(deciding_seconds(record), record["wall_times_faster_than"], "wall")
    clock = "events" if record["device"] == "cuda" else "CPU time"
    return Times(deciding_seconds(record), record["times_faster_than"], clock)


def deciding_seconds(record: Record) -> dict[str, float]:
    """Quantiles by the clock that a measurement is judged by."""
    seconds: dict[str, float] = record["wall_seconds" if threads_of(record) > 1 else "seconds"]
    return seconds


def rounded(value: Any) -> Any:
    """Five significant digits: what a clock on a shared machine can tell, and files that stay small."""
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return value


def _append(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, sort_keys=True) + "\n")


def _lines(path: Path) -> Iterator[Record]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def append(record: Record, folder: Path = FOLDER) -> None:
    """Appends a measurement to the file of its op."""
    _append(folder / f"{record['op'].rstrip('_')}.jsonl", rounded(record))


def remember_environment(identity: str, described: dict[str, object], folder: Path = FOLDER) -> None:
    """Stores an environment's description once, under its identity."""
    path = folder / _ENVIRONMENTS
    if all(line["environment"] != identity for line in _lines(path)):
        _append(path, {"environment": identity, **described})


def environments(folder: Path = FOLDER) -> dict[str, Record]:
    """identity -> description."""
    return {line["environment"]: line for line in _lines(folder / _ENVIRONMENTS)}


def measurements(folder: Path = FOLDER) -> Iterator[Record]:
    """All measurements of ops, oldest first within each; the folder also holds results of whole runs."""
    for path in sorted(folder.glob("*.jsonl")):
        yield from (line for line in _lines(path) if "op" in line)


def latest(records: Iterator[Record]) -> dict[tuple[str, ...], Record]:
    """The newest record of every environment, op, size, dtype, pass, candidate and number of threads."""
    newest: dict[tuple[str, ...], Record] = {}
    for record in records:
        newest[key(record)] = record  # files are appended to: the later line is the newer one
    return newest


def key(record: Record) -> tuple[str, ...]:
    """What two records must share to be about the same thing, whatever the commit."""
    named = ("environment", "op", "size", "dtype", "pass", "candidate")
    return (*(str(record[name]) for name in named), f"{threads_of(record)} threads")
