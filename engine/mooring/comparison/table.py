"""The table of a comparison, for a terminal and in Markdown, from its records alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table

from mooring.comparison.plan import BASELINE, Part
from mooring.comparison.records import Record
from mooring.comparison.statistics import Paired, paired, what_it_can_show
from mooring.report.metrics import counted
from mooring.report.records import from_json_number

_TEXTS = ("part", "method")  # the other columns are numbers
_COST = ("learning rate", "s/epoch", "images/s", "peak MiB")
_COSINE = "cosine: "  # of the features on that set with the pretrained ones


@dataclass(frozen=True, slots=True)
class Line:
    """One method on one part of the training images, over its seeds.

    Attributes:
        top1, mean_per_class: by seed.
        gain: top-1 over plain fine-tuning, paired over the seeds that both have; None for plain fine-tuning
            itself, and where it was not run.
        lr: the rate it was run with.
        seconds_per_epoch, images_per_second: means over the runs.
        memory: the most that any of its runs held, bytes.
        extra_tests: name of a further test set -> top-1 by seed.
        distortion: name of an evaluated set -> cosine of the features with the pretrained ones, by seed.
    """

    part: Part
    method: str
    top1: dict[int, float]
    mean_per_class: dict[int, float]
    gain: Paired | None
    lr: float
    seconds_per_epoch: float
    images_per_second: float
    memory: int
    extra_tests: dict[str, dict[int, float]] = field(default_factory=dict)
    distortion: dict[str, dict[int, float]] = field(default_factory=dict)


def measured_split(records: Sequence[Record]) -> str:
    """``test`` where every result was tested, else ``val``."""
    return "test" if all(r["test"] is not None for r in records if r["role"] == "result") else "val"


def lines(records: Sequence[Record]) -> list[Line]:
    """The table's content: parts and methods in the order of their records."""
    split = measured_split(records)
    groups: dict[tuple[Part, str], list[Record]] = {}
    for record in records:
        if record["role"] == "result":
            part = Part(record["shots"], record["fraction"])
            groups.setdefault((part, record["method"]), []).append(record)
    parts = list(dict.fromkeys(part for part, _ in groups))
    found = []
    for part, method in sorted(groups, key=lambda key: parts.index(key[0])):
        runs = groups[part, method]
        top1 = {run["seed"]: float(from_json_number(run[split]["top1"])) for run in runs}
        base = {
            run["seed"]: float(from_json_number(run[split]["top1"]))
            for run in groups.get((part, BASELINE), [])
        }
        differences = [top1[seed] - base[seed] for seed in sorted(top1) if seed in base]
        found.append(
            Line(
                part=part,
                method=method,
                top1=top1,
                mean_per_class={
                    run["seed"]: float(from_json_number(run[split]["mean_per_class"])) for run in runs
                },
                gain=paired(differences) if differences and method != BASELINE else None,
                lr=runs[0]["lr"],
                seconds_per_epoch=statistics.fmean(run["seconds_per_epoch"] for run in runs),
                images_per_second=statistics.fmean(run["images_per_second"] for run in runs),
                memory=max(run["peak_memory"]["bytes"] for run in runs),
                extra_tests=_by_set(runs, "extra_tests", "top1"),
                distortion=_by_set(runs, "distortion", "feature_cosine"),
            )
        )
    return found


def _by_set(runs: Sequence[Record], measured: str, value: str) -> dict[str, dict[int, float]]:
    """A number that each run has for several sets: set -> seed -> number, for the sets that all runs have."""
    sets = [list(run.get(measured) or {}) for run in runs]
    return {
        name: {run["seed"]: float(from_json_number(run[measured][name][value])) for run in runs}
        for name in sets[0]
        if all(name in each for each in sets)
    }


def _cells(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    split = measured_split(records)
    found = lines(records)
    extra = _shared([list(line.extra_tests) for line in found])
    moved = [name for name in _shared([list(line.distortion) for line in found]) if name != "val"]
    with_part = any(line.part.label for line in found)
    head = ["part"] if with_part else []
    head += [
        "method", f"{split} top-1", "mean per class", f"over {BASELINE}, points", "p",
        *extra, *(f"{_COSINE}{name.removeprefix('test/')}" for name in moved),
        *_COST,
    ]  # fmt: skip
    rows = []
    for line in found:
        row = [line.part.label or "all"] if with_part else []
        row += [line.method, _share(line.top1), _share(line.mean_per_class), *_gain(line.gain)]
        row += [_share(line.extra_tests[name]) for name in extra]
        row += [_mean(line.distortion[name]) for name in moved]
        row += [f"{line.lr:.2g}", f"{line.seconds_per_epoch:.3g}", f"{line.images_per_second:.3g}"]
        rows.append([*row, f"{line.memory / 2**20:.0f}"])
    return head, rows


def _shared(names: Sequence[Sequence[str]]) -> list[str]:
    """The names that are in every list, in the order of the first."""
    return [name for name in names[0] if all(name in each for each in names)] if names else []


def _mean(values: dict[int, float]) -> str:
    return f"{statistics.fmean(values.values()):.3f}"


def _share(values: dict[int, float]) -> str:
    numbers = [100 * value for value in values.values()]
    spread = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.1f}{spread} %"


def _gain(gain: Paired | None) -> tuple[str, str]:
    if gain is None:
        return "-", "-"
    width = f" ± {100 * gain.half_width:.1f}" if math.isfinite(gain.half_width) else ""
    p = "-" if not math.isfinite(gain.p) else f"{gain.p:.2f}" if gain.p >= 0.01 else f"{gain.p:.1g}"
    return f"{100 * gain.mean:+.1f}{width}", p


def notes(records: Sequence[Record]) -> list[str]:
    """What must be read with the table, one sentence each."""
    results = [record for record in records if record["role"] == "result"]
    if not results:
        return ["No run is finished yet."]
    found = lines(records)
    seeds = min(len(line.top1) for line in found)
    tested = measured_split(records) == "test"
    told = [
        f"{counted(len(results), 'run')} of {counted(results[0]['epochs'], 'epoch')} on {results[0]['model']}, "
        f"the same images, batches and epochs for all methods of a seed; mean ± standard deviation over seeds.",
    ]
    swept = next((record["sweep"] for record in results if record["sweep"]), None)
    if swept is not None:
        rates = ", ".join(f"{rate['lr']:g}" for rate in swept["rates"])
        told.append(
            f"Each method's learning rate was chosen among {rates} by {swept['by']}"
            + ("; only the chosen run was tested." if tested else ".")
        )
    if not tested:
        told.append(
            "There is no test split: the figures are of the validation split that chose the epoch"
            + (", and at the first seed the learning rate," if swept is not None else "")
            + " and flatter every method."
        )
    if any(line.gain is not None for line in found):
        compared = sum(line.gain is not None for line in found)
        told.append(
            f"p: paired t-test over seeds against {BASELINE}, two-sided; beside the difference, its 95 % interval"
            + (
                f"; {compared} comparisons are made, and p is not corrected for that."
                if compared > 1
                else "."
            )
        )
        told.append(what_it_can_show(seeds))
    elif len({line.method for line in found}) > 1:
        told.append(f"{BASELINE} is not among the methods, so nothing is tested against it.")
    told.append(
        "Peak memory: " + ", ".join(sorted({record["peak_memory"]["how"] for record in results})) + "."
    )
    return told


def terminal(records: Sequence[Record], title: str) -> list[Table]:
    """The table for a terminal, in two that fit 80 columns: what was reached, and what it cost."""
    head, rows = _cells(records)
    names = [name for name in head if name in _TEXTS]
    extra = _shared([list(line.extra_tests) for line in lines(records)])
    moved = [name for name in head if name.startswith(_COSINE)]
    reached = [name for name in head if name not in (*names, *_COST, *extra, *moved)]
    tables = []
    for shown, called in (
        (reached, title),
        (extra, "further test sets, top-1"),
        (moved, "features, before and after"),
        (list(_COST), "what it cost"),
    ):
        if not shown:
            continue
        table = Table(title=escape(called), title_justify="left", header_style="bold")
        places = [head.index(name) for name in (*names, *shown)]
        for place in places:
            left = head[place] in _TEXTS
            table.add_column(escape(head[place]), justify="left" if left else "right", no_wrap=left)
        for row in rows:
            table.add_row(*(escape(row[place]) for place in places))
        tables.append(table)
    return tables


def markdown(records: Sequence[Record]) -> str:
    """The table in Markdown, with its notes."""
    head, rows = _cells(records)
    table = [
        "| " + " | ".join(head) + " |",
        "|" + "".join("---|" if name in _TEXTS else "---:|" for name in head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join([*table, "", *(f"- {note}" for note in notes(records))]) + "\n"
