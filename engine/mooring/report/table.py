"""Result tables: a row per method, a column per metric; for a terminal and for a README."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from mooring.report.metrics import Metric, metric


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a result table.

    Attributes:
        name: what was run.
        values: metric -> one number, or one per seed; a missing metric is shown as a dash.
    """

    name: str
    values: Mapping[str, float | Sequence[float]]


def results_table(
    rows: Sequence[Row], columns: Sequence[str], *, title: str | None = None, first: str = "method"
) -> Table:
    """A table for the terminal; the best value of each column is bold. Names and title are plain text."""
    table = Table(
        title=escape(title) if title is not None else None, title_justify="left", header_style="bold"
    )
    table.add_column(escape(first), no_wrap=True)
    for column in columns:
        table.add_column(escape(metric(column).label), justify="right")
    best = {column: _best(rows, column) for column in columns}
    for row in rows:
        cells = [_cell(row, column) for column in columns]
        marked = [f"[bold]{c}[/]" if row in best[n] else c for n, c in zip(columns, cells, strict=True)]
        table.add_row(escape(row.name), *marked)
    return table


def markdown_table(rows: Sequence[Row], columns: Sequence[str], *, first: str = "method") -> str:
    """The same table in Markdown, ending with a line end."""
    best = {column: _best(rows, column) for column in columns}
    lines = [
        "| " + " | ".join([first, *(metric(column).label for column in columns)]) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for row in rows:
        cells = [_cell(row, column) for column in columns]
        marked = [f"**{c}**" if row in best[n] else c for n, c in zip(columns, cells, strict=True)]
        lines.append("| " + " | ".join([row.name.replace("|", r"\|"), *marked]) + " |")
    return "\n".join(lines) + "\n"


def _numbers(row: Row, column: str) -> list[float]:
    value = row.values.get(column)
    if value is None:
        return []
    return [float(v) for v in value] if isinstance(value, Sequence) else [float(value)]


def _cell(row: Row, column: str) -> str:
    numbers, shown = _numbers(row, column), metric(column)
    if not numbers:
        return "-"
    if len(numbers) == 1:
        return shown.show(numbers[0])
    mean, deviation = statistics.fmean(numbers), statistics.stdev(numbers)
    if shown.kind == "share":
        return f"{100 * mean:.1f} ± {100 * deviation:.1f} %"
    return f"{shown.show(mean)} ± {shown.show(deviation)}"


def _best(rows: Sequence[Row], column: str) -> list[Row]:
    """The rows whose shown value is the best; none where there is nothing to compare."""
    shown: Metric = metric(column)
    means = [(row, statistics.fmean(numbers)) for row in rows if (numbers := _numbers(row, column))]
    if shown.better is None or len(means) < 2:
        return []
    top = (max if shown.better == "high" else min)(mean for _, mean in means)
    return [row for row, mean in means if shown.show(mean) == shown.show(top)]
