"""``python -m bench.accuracy.tables``: RESULTS.md, the README's tables and the picture, from the kept records alone."""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.accuracy.experiments import EXPERIMENTS
from bench.accuracy.keep import FOLDER, Record, kept, names
from bench.accuracy.picture import draw_gains
from bench.accuracy.step_cost import FILE as STEP_COST
from bench.environment import ROOT
from bench.records import PLOTS
from mooring.comparison.table import Line, lines, markdown

RESULTS = ROOT / "bench" / "accuracy" / "RESULTS.md"
PICTURE = PLOTS / "accuracy.png"
_BEGIN, _END = "<!-- accuracy -->", "<!-- end of accuracy -->"
_BLOCK = re.compile(re.escape(_BEGIN) + r"\n.*?" + re.escape(_END), flags=re.DOTALL)


def experiments(folder: Path = FOLDER) -> dict[str, tuple[Record, list[Record]]]:
    """The experiments that have records, in the order in which they are defined."""
    there = set(names(folder)) - {Path(STEP_COST).stem}
    return {name: kept(name, folder) for name in EXPERIMENTS if name in there}


def results(found: Mapping[str, tuple[Record, list[Record]]], costs: Sequence[Record]) -> str:
    """Every experiment's table with what must be read with it."""
    text = [
        "# Accuracy on real images",
        "",
        "Drawn from `bench/records/accuracy/*.jsonl` by `python -m bench.accuracy.tables`; the runs are made again by "
        "`python -m bench.accuracy --assets DIR --out DIR NAME`. What the figures say, and what they do not: README.md "
        "beside this file.",
        "",
    ]
    for name, (head, records) in found.items():
        text += [f"## `{name}`", "", f"{head['title']}.", "", markdown(records).rstrip()]
        text += [f"- {_machine(head)}", ""]
    if costs:
        text += ["## What a step costs", "", cost_table(costs)]
    return "\n".join(text).rstrip() + "\n"


def _machine(head: Record) -> str:
    """Where and from which source the runs were made."""
    seen = head["environments"]
    commits = sorted({each["commit"][:12] for each in seen})
    machines = sorted(
        {
            f"{each['cpu']['model']} ({each['cpu']['capability']}), torch {each['packages']['torch']}"
            for each in seen
        }
    )
    return f"{'; '.join(machines)}; one thread; commit {', '.join(commits)}."


def _parts(records: Sequence[Record]) -> Iterator[tuple[str, list[Line]]]:
    """Each part of an experiment, with its lines."""
    by_part: dict[str, list[Line]] = {}
    for line in lines(records):
        by_part.setdefault(line.part.label, []).append(line)
    yield from by_part.items()


def summary(found: Mapping[str, tuple[Record, list[Record]]]) -> str:
    """A row per method, a column per experiment and part: test top-1, mean ± standard deviation; the best in bold."""
    columns: list[tuple[str, dict[str, str]]] = []
    order: list[str] = []
    for name, (_, records) in found.items():
        for label, own in _parts(records):
            best = max(statistics.fmean(line.top1.values()) for line in own)
            cells = {}
            for line in own:
                mean = statistics.fmean(line.top1.values())
                spread = f" ± {100 * statistics.stdev(line.top1.values()):.1f}" if len(line.top1) > 1 else ""
                text = f"{100 * mean:.1f}{spread}"
                cells[line.method] = f"**{text}**" if mean == best else text
                if line.method not in order:
                    order.append(line.method)
            columns.append(
                (f"`{name}`" + (f", {label}" if label and not name.endswith("shots") else ""), cells)
            )
    rows = [[method, *(cells.get(method, "") for _, cells in columns)] for method in order]
    return _table(["method", *(title for title, _ in columns)], rows)


def cost_table(costs: Sequence[Record]) -> str:
    """Times of a step over plain fine-tuning, by encoder."""
    encoders = list(dict.fromkeys(record["encoder"] for record in costs))
    newest = {(record["encoder"], record["method"]): record["times"] for record in costs}
    methods = list(dict.fromkeys(record["method"] for record in costs))

    def cell(encoder: str, method: str) -> str:
        times = newest.get((encoder, method))
        return "" if times is None else f"{times['p50']:.2f} ({times['p20']:.2f} to {times['p80']:.2f})"

    rows = [[method, *(cell(encoder, method) for encoder in encoders)] for method in methods]
    return _table(["step over plain fine-tuning, times", *encoders], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, marks, *rows))


def readme_block(found: Mapping[str, tuple[Record, list[Record]]], costs: Sequence[Record]) -> str:
    """What stands between the markers of the README."""
    picture = f"![Test top-1 over plain fine-tuning]({PICTURE.relative_to(ROOT)})"
    parts = [_BEGIN, picture, "", summary(found)]
    if costs:
        parts += [cost_table(costs)]
    return "\n".join(parts).rstrip() + f"\n{_END}"


def step_costs(folder: Path = FOLDER) -> list[Record]:
    """The records of what a step costs."""
    file = folder / STEP_COST
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def with_block(readme: str, block: str) -> str:
    """The README with the tables of the records.

    Raises:
        ValueError: it has no place for them.
    """
    if not _BLOCK.search(readme):
        raise ValueError(f"README.md must hold {_BEGIN} and {_END}")
    return _BLOCK.sub(lambda _: block, readme)


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.accuracy.tables", description=__doc__).parse_args()
    found, costs = experiments(), step_costs()
    RESULTS.write_text(results(found, costs), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(
        with_block(readme.read_text(encoding="utf-8"), readme_block(found, costs)), encoding="utf-8"
    )
    draw_gains({head["title"]: records for head, records in found.values()}, PICTURE)


if __name__ == "__main__":
    main()
