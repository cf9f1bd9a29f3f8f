"""The picture of a comparison, from its records alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mooring.comparison.records import Record
from mooring.comparison.table import Line, lines, measured_split
from mooring.errors import RunFolderError
from mooring.report.plots import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by colour-blind eyes; marks and dashes differ too, for print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A8A")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
_DASHES = ("-", "--", "-.", ":")


def draw_comparison(records: Sequence[Record], file: Path) -> None:
    """Top-1 of each method with its standard deviation and every seed; over the parts, where there are several.

    Args:
        records: of the finished runs.
        file: the picture to write.

    Raises:
        RunFolderError: it cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found = lines(records)
    split = measured_split(records)
    parts = list(dict.fromkeys(line.part for line in found))
    methods = list(dict.fromkeys(line.method for line in found))
    with rc_context(STYLE):
        height = 4.8 if len(parts) > 1 else 1.4 + 0.45 * len(methods)
        figure = Figure(figsize=(8, height), dpi=130, layout="constrained")
        axes = figure.subplots()
        seeds = max(len(line.top1) for line in found)
        spread = f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else ", one seed"
        axes.set_title(("Test" if split == "test" else "Validation") + " top-1 (%)" + spread)
        if len(parts) > 1:
            _over_parts(axes, found, methods)
        else:
            _by_method(axes, found)
        try:
            figure.savefig(file)
        except OSError as err:
            raise RunFolderError(f"cannot write {file}: {err.strerror}") from None


def _by_method(axes: Axes, found: Sequence[Line]) -> None:
    for place, line in enumerate(found):
        values = [100 * value for value in line.top1.values()]
        axes.plot(values, [place] * len(values), "|", color="#8A8A8A", markersize=11)  # every seed
        axes.errorbar(
            [statistics.fmean(values)],
            [place],
            xerr=[statistics.stdev(values)] if len(values) > 1 else None,
            fmt=_MARKS[place % len(_MARKS)],
            color=_COLOURS[place % len(_COLOURS)],
            capsize=4,
        )
    axes.set_yticks(range(len(found)), [line.method for line in found])
    axes.set_ylim(len(found) - 0.5, -0.5)  # the first on top, as in the table


def _over_parts(axes: Axes, found: Sequence[Line], methods: Sequence[str]) -> None:
    shots = found[0].part.shots is not None
    for place, method in enumerate(methods):
        own = sorted((line for line in found if line.method == method), key=_amount)
        # side by side, so that the bars can be told apart
        shift = 1 + 0.02 * (place - (len(methods) - 1) / 2)
        values = [[100 * value for value in line.top1.values()] for line in own]
        axes.errorbar(
            [_amount(line) * shift for line in own],
            [statistics.fmean(each) for each in values],
            yerr=[statistics.stdev(each) if len(each) > 1 else 0.0 for each in values],
            fmt=_MARKS[place % len(_MARKS)] + _DASHES[place // len(_COLOURS) % len(_DASHES)],
            color=_COLOURS[place % len(_COLOURS)],
            capsize=3,
            label=method,
        )
    axes.set_xscale("log")
    amounts = sorted({_amount(line) for line in found})
    axes.set_xticks(amounts, [f"{amount:g}" for amount in amounts])
    axes.minorticks_off()
    axes.set_xlabel("training images per class" if shots else "share of the training images (%)")
    axes.legend()


def _amount(line: Line) -> float:
    return float(line.part.shots) if line.part.shots is not None else 100 * (line.part.fraction or 1.0)
