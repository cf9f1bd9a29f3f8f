"""``python -m bench.plot``: pictures and a table from the records, and from nothing else. It never times."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from bench import records
from bench.records import Record

_COLOURS = {
    "reference": "#8c8c8c",
    "svd": "#8c8c8c",
    "compile": "#c08040",
    "graph": "#b5a642",
    "public": "#b04a4a",
    "native": "#2f6f9f",
    "auto": "#2f6f9f",
    "triton graph": "#2f6f9f",
    "triton": "#2f6f9f",
    "polar": "#2f6f9f",
}


def _groups(newest: list[Record]) -> dict[tuple[str, str], dict[str, dict[str, Record]]]:
    """(environment, op) -> "size, dtype, pass" -> candidate -> record."""
    groups: dict[tuple[str, str], dict[str, dict[str, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in newest:
        row = f"{record['size']}\n{record['dtype']} {record['pass']}"
        groups[record["environment"], record["op"]][row][record["candidate"]] = record
    return groups


def draw(rows: dict[str, dict[str, Record]], title: str, path: Path) -> None:
    """Bars of the median time, whiskers from 20 to 80 %, one group per size, dtype and pass; log scale."""
    names = sorted({name for row in rows.values() for name in row}, key=list(_COLOURS).index)
    height = 0.8 / len(names)
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.26 * len(names) * len(rows)), layout="constrained")
    for number, name in enumerate(names):
        places, medians, below, above = [], [], [], []
        for place, row in enumerate(rows.values()):
            if name in row:
                seconds = row[name]["seconds"]
                places.append(place + (number - (len(names) - 1) / 2) * height)
                medians.append(seconds["p50"] * 1e6)
                below.append((seconds["p50"] - seconds["p20"]) * 1e6)
                above.append((seconds["p80"] - seconds["p50"]) * 1e6)
        bars = axes.barh(places, medians, height, xerr=[below, above], color=_COLOURS[name], label=name)
        axes.bar_label(bars, fmt="%.3g", padding=4, fontsize=7)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("microseconds, median with 20 % and 80 %")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _faster(record: Record, other: str) -> str:
    ratio = record["times_faster_than"].get(other)
    return "" if ratio is None else f"{ratio['p50']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


def _saved(record: Record, row: dict[str, Record], steps: dict[tuple[str, str], float]) -> str:
    """Share of a training step that this candidate saves over the slower of reference and public code."""
    rest = steps.get((record["environment"], record["size"]))
    others = [row[name]["seconds"]["p50"] for name in ("reference", "svd", "public") if name in row]
    if rest is None or not others or record["seconds"]["p50"] >= max(others):
        return ""
    return f"{(max(others) - record['seconds']['p50']) / (rest + max(others)):.2%}"


def table(newest: list[Record]) -> str:
    """Markdown table of all timed candidates, with the share of a training step where one was measured."""
    steps: dict[tuple[str, str], float] = {}
    lines = [
        "| environment | commit | op | size | dtype | pass | candidate | median us | "
        "times faster than eager | times faster than public code | share of copy rate | "
        "share of matmul rate | relative error | "
        "of a training step saved |",
        "|---" * 14 + "|",
    ]
    for (identity, op), rows in _groups([r for r in newest if "times_faster_than" in r]).items():
        for row in rows.values():
            for name, r in row.items():
                cells = (
                    identity,
                    r["commit"],
                    op,
                    r["size"],
                    r["dtype"],
                    r["pass"],
                    name,
                    f"{r['seconds']['p50'] * 1e6:.1f}",
                    _faster(r, r["baseline"]),
                    _faster(r, "public"),
                    f"{r['share_of_copy_rate']:.1%}",
                    f"{r['share_of_matmul_rate']:.1%}",
                    f"{r['relative_error']:.1e}",
                    _saved(r, row, steps),
                )
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Draws everything; returns 1 when there are no records."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("--records", type=Path, default=records.FOLDER)
    parser.add_argument("--out", type=Path, default=records.PLOTS)
    chosen = parser.parse_args(arguments)
    newest = list(records.latest(records.measurements(chosen.records)).values())
    timed = [r for r in newest if "times_faster_than" in r]
    if not timed:
        print(f"no records in {chosen.records}: run  python -m bench  first", file=sys.stderr)
        return 1
    described = records.environments(chosen.records)
    for (identity, op), rows in _groups(timed).items():
        machine = described[identity]
        device = machine.get("gpu", f"{machine['cpu']}, {machine.get('threads', 1)} thread")
        commits = sorted({record["commit"] for row in rows.values() for record in row.values()})
        title = (
            f"{op} on {device}, torch {machine['torch']}\ncommit {', '.join(commits)}, environment {identity}"
        )
        draw(rows, title, chosen.out / f"{op.rstrip('_')}-{identity}.png")
    (chosen.out / "table.md").write_text(table(newest), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
