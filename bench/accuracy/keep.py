"""The kept form of a comparison's records: what all runs share once, then a line a run. No path of the machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.records import FOLDER as RECORDS

FOLDER = RECORDS / "accuracy"
_OF_A_RUN = (
    "run", "role", "method", "shots", "fraction", "seed", "lr", "head_lr", "sweep", "best_epoch", "val", "test",
    "extra_tests", "distortion", "seconds_per_epoch", "images_per_second", "peak_memory", "counts", "data",
)  # fmt: skip
Record = dict[str, Any]


def keep(
    name: str, title: str, records: Sequence[Record], roots: Mapping[str, Path], folder: Path = FOLDER
) -> Path:
    """Writes the records of one experiment.

    Args:
        name, title: of the experiment.
        records: of its runs, as a comparison writes them.
        roots: name -> folder; paths below it begin with ``{name}`` in the file.
        folder: where the file lies.
    """
    flat = [_flat(record["settings"]) for record in records]
    shared = {key: value for key, value in flat[0].items() if all(f.get(key) == value for f in flat)}
    head = {
        "what": "accuracy",
        "experiment": name,
        "title": title,
        "model": records[0]["model"],
        "epochs": records[0]["epochs"],
        "settings": shared,
        "environments": _distinct([record["environment"] for record in records]),
    }
    lines = [head]
    for record, own in zip(records, flat, strict=True):
        differing = {key: value for key, value in own.items() if key not in shared}
        lines.append({key: record.get(key) for key in _OF_A_RUN} | {"settings": differing})
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    text = "".join(json.dumps(_rounded(line)) + "\n" for line in lines)
    for root, path in roots.items():
        text = text.replace(str(path), f"{{{root}}}")
    file.write_text(text, encoding="utf-8")
    return file


def kept(name: str, folder: Path = FOLDER) -> tuple[Record, list[Record]]:
    """What all runs of an experiment share, and its runs as the tables of ``mooring compare`` take them."""
    head, *runs = (json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines())
    for run in runs:
        run |= {"model": head["model"], "epochs": head["epochs"]}
    return head, runs


def names(folder: Path = FOLDER) -> list[str]:
    """The experiments that have records."""
    return sorted(file.stem for file in folder.glob("*.jsonl"))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, inner in tree.items()
        for key, value in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }


def _distinct(described: Sequence[Record]) -> list[Record]:
    seen: dict[str, Record] = {}
    for each in described:
        seen.setdefault(json.dumps(each, sort_keys=True), each)
    return list(seen.values())


def _rounded(value: Any) -> Any:
    """Six significant digits: more than any of these numbers has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def walk(value: Any) -> Iterator[str]:
    """Every text in a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)
