"""The picture of all experiments: how far each method is from plain fine-tuning, seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from mooring.comparison.plan import BASELINE
from mooring.comparison.records import Record
from mooring.comparison.table import Line, lines
from mooring.report.plots import STYLE

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#8A8A8A"
_ACROSS = 3


def draw_gains(found: Mapping[str, Sequence[Record]], file: Path) -> None:
    """One panel per experiment and part: top-1 over plain fine-tuning in points, the mean and every seed.

    Args:
        found: title -> records of its runs.
        file: the picture to write.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = [panel for title, records in found.items() for panel in _panels(title, records)]
    rows = -(-len(panels) // _ACROSS)
    heights = [max(len(own) for _, own in panels[row * _ACROSS : (row + 1) * _ACROSS]) for row in range(rows)]
    with rc_context(STYLE):
        figure = Figure(
            figsize=(14, sum(0.26 * height + 0.9 for height in heights)), dpi=110, layout="constrained"
        )
        grid = figure.subplots(rows, _ACROSS, squeeze=False, height_ratios=[height + 3 for height in heights])
        for axes, panel in zip(grid.flat, [*panels, *[None] * (rows * _ACROSS - len(panels))], strict=True):
            if panel is None:
                axes.set_axis_off()
                continue
            title, own = panel
            for place, (_, gains) in enumerate(own):
                mean = statistics.fmean(gains)
                axes.plot(gains, [place] * len(gains), "|", color=_GREY, markersize=9)
                axes.plot([mean], [place], "o", color=_BLUE if mean >= 0 else _ORANGE, markersize=6)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_yticks(range(len(own)), [method for method, _ in own])
            axes.set_ylim(len(own) - 0.5, -0.5)
            axes.set_title(_in_two_lines(title), fontsize=8)
        figure.supxlabel(
            "test top-1 over plain fine-tuning of the same seed, points: every seed (|) and the mean (o)"
        )
        figure.savefig(file)


def _panels(title: str, records: Sequence[Record]) -> list[tuple[str, list[tuple[str, list[float]]]]]:
    parts: dict[str, list[Line]] = {}
    for line in lines(records):
        parts.setdefault(line.part.label, []).append(line)
    found = []
    for label, own in parts.items():
        base = next((line.top1 for line in own if line.method == BASELINE), {})
        gains = [
            (line.method, [100 * (line.top1[seed] - base[seed]) for seed in line.top1 if seed in base])
            for line in own
            if line.method != BASELINE
        ]
        shown = title.replace("`", "")
        found.append((f"{shown} ({label})" if label else shown, [each for each in gains if each[1]]))
    return found


def _in_two_lines(title: str) -> str:
    words, lines_, width = title.split(), [""], 40
    for word in words:
        if len(lines_[-1]) + len(word) > width:
            lines_.append("")
        lines_[-1] = f"{lines_[-1]} {word}".strip()
    return "\n".join(lines_)
