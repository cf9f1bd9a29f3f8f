"""``python -m bench.compare OLD NEW``: what changed between two commits, from records of one environment.

Measurements are paired when op, size, dtype, pass, candidate, number of threads and environment are the same.
Machines drift between runs, so the plain ratio of two medians says little. Each candidate is first divided
by the copy rate of its own run; the change of that quotient is what is shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench import records
from bench.records import Record


@dataclass(frozen=True)
class Change:
    """One measurement at two commits. ``speed_up`` above 1: the new commit is faster."""

    key: tuple[str, ...]
    old_seconds: float
    new_seconds: float
    speed_up: float  # of the share of the copy rate
    beyond_noise: bool  # the 20-80 % ranges, scaled by their copy rates, do not overlap


def _at(all_records: Iterable[Record], commit: str) -> dict[tuple[str, ...], Record]:
    """Newest timed record per key of the commit whose name begins with ``commit``."""
    timed = (r for r in all_records if r["commit"].startswith(commit) and "seconds" in r and "baseline" in r)
    return records.latest(timed)


def _copy_rate(record: Record, other: Record) -> float:
    """1 where the two runs copied different amounts: out of another cache, that rate says nothing of drift."""
    same = record.get("copy_bytes") == other.get("copy_bytes")
    return float(record["copy_bytes_per_second"]) if same else 1.0


def compare(all_records: Iterable[Record], old_commit: str, new_commit: str) -> list[Change]:
    """Changes of all that was measured at both commits in one environment, largest slow-down first."""
    kept = list(all_records)
    old_records, new_records = _at(kept, old_commit), _at(kept, new_commit)
    changes = []
    for key in old_records.keys() & new_records.keys():
        old, new = old_records[key], new_records[key]
        # seconds times copy rate: bytes that a copy would have moved in that time
        old_seconds, new_seconds = records.deciding_seconds(old), records.deciding_seconds(new)
        old_cost = {q: s * _copy_rate(old, new) for q, s in old_seconds.items()}
        new_cost = {q: s * _copy_rate(new, old) for q, s in new_seconds.items()}
        changes.append(
            Change(
                key=key,
                old_seconds=old_seconds["p50"],
                new_seconds=new_seconds["p50"],
                speed_up=old_cost["p50"] / new_cost["p50"],
                beyond_noise=new_cost["p20"] > old_cost["p80"] or new_cost["p80"] < old_cost["p20"],
            )
        )
    return sorted(changes, key=lambda change: (change.speed_up, change.key))


def main(arguments: list[str] | None = None) -> int:
    """Prints the changes; returns 1 when nothing can be paired."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("old", help="commit, or the start of its name, as in the records")
    parser.add_argument("new")
    parser.add_argument("--records", type=Path, default=records.FOLDER, help="folder of the record files")
    chosen = parser.parse_args(arguments)
    changes = compare(records.measurements(chosen.records), chosen.old, chosen.new)
    if not changes:
        print(
            f"no measurement was made at both {chosen.old} and {chosen.new} in one environment: "
            "run  python -m bench  at each of them on the same machine",
            file=sys.stderr,
        )
        return 1
    for change in changes:
        mark = "*" if change.beyond_noise else " "
        print(
            f"{mark} x{change.speed_up:<6.2f}"
            f"{change.old_seconds * 1e6:>12.1f} -> {change.new_seconds * 1e6:>10.1f} us  "
            f"{'  '.join(change.key[1:])}"
        )
    print("* the 20-80 % ranges do not overlap; x is corrected by the copy rate of each run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
