"""``python -m bench.accuracy.tables``: RESULTS.md, the README's tables and the picture, from the kept records alone."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.accuracy.experiments import EXPERIMENTS
from bench.accuracy.keep import FOLDER, Record, kept, names
from bench.accuracy.picture import draw_gains
from bench.accuracy.step_cost import FILE as STEP_COST
from bench.environment import ROOT
from bench.readme_block import with_block
from bench.records import PLOTS
from mooring.comparison.table import Line, lines, markdown

RESULTS = ROOT / "bench" / "accuracy" / "RESULTS.md"
PICTURE = PLOTS / "accuracy.png"
_SOURCE = "source_top1"
# What the README shows of the experiments; those that ask why are in RESULTS.md.
_README = {
    "Fruit in a supermarket, EfficientNet-Lite0: all 675 training photos, and 5 a class": (
        "fruit",
        "fruit_5_shots",
    ),
    "Few flowers, EfficientNet-Lite0": ("flowers12_lite0", "tf_flowers5_lite0"),
    "Few flowers, ViT-tiny": ("flowers12_vit", "tf_flowers5_vit"),
    "Trained on photos; tested on photos, art, cartoons and sketches": ("pacs6",),
    "Soft Fine-tuning's schedules, and what is left of the source task": ("soft_lite0", "soft_resnet20"),
    "Concept-Tuning and Bi-Tuning on varieties of fruit": ("fine_grained",),
}
_BEGIN, _END = "<!-- accuracy -->", "<!-- end of accuracy -->"


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
    """A row per method, columns per experiment and part: top-1, mean ± standard deviation in percent; the best in bold.

    Beside the test split stand the further test sets and, where it was measured, accuracy on the source task.
    """
    columns: list[tuple[str, dict[str, str]]] = []
    order: list[str] = []
    for name, (_, records) in found.items():
        for label, own in _parts(records):
            order += [line.method for line in own if line.method not in order]
            title = f"`{name}`" + (f", {label}" if label and label.replace(" ", "_") not in name else "")
            columns.append((title, _column({line.method: line.top1 for line in own})))
            for further in dict.fromkeys(further for line in own for further in line.extra_tests):
                columns.append(
                    (f"{title}: {further}", _column({line.method: line.extra_tests[further] for line in own}))
                )
            if all(_SOURCE in line.beyond for line in own):
                columns.append(
                    (f"{title}: source", _column({line.method: line.beyond[_SOURCE] for line in own}))
                )
    rows = [[method, *(cells.get(method, "") for _, cells in columns)] for method in order]
    return _table(["method", *(title for title, _ in columns)], rows)


def _column(values: Mapping[str, Mapping[int, float]]) -> dict[str, str]:
    """Method -> mean ± standard deviation over seeds, in percent; the best in bold."""
    means = {method: statistics.fmean(of.values()) for method, of in values.items()}
    cells = {}
    for method, of in values.items():
        spread = f" ± {100 * statistics.stdev(of.values()):.1f}" if len(of) > 1 else ""
        text = f"{100 * means[method]:.1f}{spread}"
        cells[method] = f"**{text}**" if means[method] == max(means.values()) else text
    return cells


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
    parts = [_BEGIN, picture, ""]
    for heading, named in _README.items():
        chosen = {name: found[name] for name in named if name in found}
        if chosen:
            parts += [f"**{heading}**", "", summary(chosen)]
    if costs:
        parts += [cost_table(costs)]
    return "\n".join(parts).rstrip() + f"\n{_END}"


def step_costs(folder: Path = FOLDER) -> list[Record]:
    """The records of what a step costs."""
    file = folder / STEP_COST
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.accuracy.tables", description=__doc__).parse_args()
    found, costs = experiments(), step_costs()
    RESULTS.write_text(results(found, costs), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(
        with_block(readme.read_text(encoding="utf-8"), readme_block(found, costs)), encoding="utf-8"
    )
    shown = [found[name] for names in _README.values() for name in names if name in found]
    draw_gains({head["title"]: records for head, records in shown}, PICTURE)


if __name__ == "__main__":
    main()
