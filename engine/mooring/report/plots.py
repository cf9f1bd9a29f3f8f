"""Pictures of a run, drawn from its records only: ``metrics.jsonl`` and ``confusion.json``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mooring.report.metrics_log import FILE_NAME, Record, read_metrics
from mooring.report.records import write_json_atomic
from mooring.report.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind eyes and in print.
_BLUE, _ORANGE, _GREEN, _GREY, _RED = "#0072B2", "#E69F00", "#009E73", "#8A8A8A", "#D55E00"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.fonttype": "none",
}
_NUMBERS_UP_TO = 25  # classes: cells are large enough to hold a count
_NAMES_UP_TO = 200  # classes: axis names stay readable
_CONFUSIONS_SHOWN = 12


def draw_run(folder: Path, confusion: Any | None = None, classes: Sequence[str] | None = None) -> list[Path]:
    """Draws ``curves.png`` and, where a confusion matrix is given or recorded, ``confusion.png``.

    Args:
        folder: the run folder.
        confusion: [C, C] counts (tensor, array or lists), row = true class; kept as ``confusion.json``.
            None: drawn from that file, where it is.
        classes: C names.

    Returns:
        The files written.
    """
    written = []
    if (folder / FILE_NAME).is_file():
        records = read_metrics(folder)
        if any(record.kind in ("train", "val") for record in records):
            written.append(_save(draw_curves(records), folder / "curves.png"))
    record = folder / "confusion.json"
    if confusion is not None:
        names = list(classes) if classes is not None else [str(i) for i in range(len(confusion))]
        write_json_atomic(record, {"classes": names, "counts": confusion})
    if record.is_file():
        kept = RunFolder(folder).read_json(record.name)
        figure = draw_confusion(np.asarray(kept["counts"]), kept["classes"])
        written.append(_save(figure, folder / "confusion.png"))
    return written


def draw_curves(records: Iterable[Record]) -> Figure:
    """Loss, accuracy and learning rate over the run, on one axis of epochs."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = list(records)
    train = [record for record in records if record.kind == "train"]
    val = [record for record in records if record.kind == "val"]
    test = [record for record in records if record.kind == "test"]
    # epochs end where validation records stand; without any, the axis counts steps
    per_epoch = val[0].step / (val[0].epoch + 1) if val and val[0].step else 1.0
    with rc_context(_STYLE):
        figure = Figure(figsize=(8, 9), dpi=130, layout="constrained")
        loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1.4])
        for axes, title in ((loss, "Loss"), (accuracy, "Accuracy (%)"), (rate, "Learning rate")):
            axes.set_title(title)
        _draw_loss(loss, train, val, per_epoch)
        _draw_accuracy(accuracy, train, val, test, per_epoch)
        _line(rate, train, "lr", per_epoch, _BLUE)
        rate.set_ylim(bottom=0)
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        rate.set_xlabel("epoch" if val else "optimizer step")
        rate.xaxis.set_major_locator(MaxNLocator(integer=True))
        rate.margins(x=0.01)
    return figure


def _series(records: Sequence[Record], name: str, per_epoch: float) -> tuple[np.ndarray, np.ndarray]:
    """[n] places on the x axis and [n] finite values."""
    points = [
        (record.step / per_epoch, float(record.values[name]))
        for record in records
        if isinstance(record.values.get(name), int | float) and math.isfinite(record.values[name])
    ]
    x, y = zip(*points, strict=True) if points else ((), ())
    return np.asarray(x, dtype=float), np.asarray(y, dtype=float)


def _line(
    axes: Axes,
    records: Sequence[Record],
    name: str,
    per_epoch: float,
    color: str,
    scale: float = 1.0,
    **how: Any,
) -> None:
    x, y = _series(records, name, per_epoch)
    if len(x):
        marker = "o" if len(x) <= 60 else ""  # more would melt into a band
        axes.plot(x, scale * y, color=color, marker=marker, markersize=3, **how)


def _draw_loss(axes: Axes, train: Sequence[Record], val: Sequence[Record], per_epoch: float) -> None:
    x, y = _series(train, "loss", per_epoch)
    if len(x) > 40:  # many points: the run of them faint, their trend on top
        axes.plot(x, y, color=_BLUE, alpha=0.25, linewidth=1)
        axes.plot(x, _smooth(y, max(3, len(y) // 30)), color=_BLUE, label="train (smoothed)")
    elif len(x):
        axes.plot(x, y, color=_BLUE, label="train")
    _line(axes, val, "nll", per_epoch, _ORANGE, label="validation NLL")
    _legend(axes)


def _draw_accuracy(
    axes: Axes, train: Sequence[Record], val: Sequence[Record], test: Sequence[Record], per_epoch: float
) -> None:
    x, y = _series(train, "top1", per_epoch)
    if len(x):
        axes.plot(x, 100 * _smooth(y, max(1, len(y) // 30)), color=_BLUE, alpha=0.6, label="train top-1")
    _line(axes, val, "top1", per_epoch, _ORANGE, 100, label="validation top-1")
    _line(
        axes, val, "mean_per_class", per_epoch, _GREEN, 100, label="validation mean per class", linestyle="--"
    )
    _mark_best(axes, val, per_epoch)
    _, tested = _series(test, "top1", per_epoch)
    if len(tested):
        axes.axhline(
            100 * tested[-1], color=_GREY, linewidth=1, linestyle=":", label=f"test {100 * tested[-1]:.1f} %"
        )
    _legend(axes)


def _mark_best(axes: Axes, val: Sequence[Record], per_epoch: float) -> None:
    x, y = _series(val, "top1", per_epoch)
    if len(x):
        best = int(y.argmax())
        axes.plot(x[best], 100 * y[best], "o", markersize=9, markerfacecolor="none", color=_RED)
        axes.plot([], [], "o", markerfacecolor="none", color=_RED, label=f"best {100 * y[best]:.1f} %")


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean of [n] values; the window shrinks at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def draw_confusion(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Row-normalised confusion matrix with the classes most often taken for each other beside it.

    Args:
        counts: [C, C], row = true class, column = predicted.
        classes: C names.
    """
    from matplotlib import rc_context
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    number = len(classes)
    if counts.shape != (number, number):
        raise ValueError(
            f"counts must be [{number}, {number}], one row per class name; got {list(counts.shape)}"
        )
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    # inches: a cell holds its number up to 25 classes, a name in 6 points (0.1 inch) up to 200
    cell = 0.48 if number <= _NUMBERS_UP_TO else max(0.105, min(0.2, 12 / number))
    side = max(4.0, number * cell) if number <= _NAMES_UP_TO else 12.0
    font = 9.0 if number <= _NUMBERS_UP_TO else max(6.0, 72 * cell * 0.62)
    with rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(side + 5.2, side + 1.8), dpi=130, layout="constrained")
        axes, side_axes = figure.subplots(1, 2, width_ratios=[side, 2.6])
        scale = PowerNorm(0.6, vmin=0, vmax=1)  # rare confusions of a good classifier stay visible
        image = axes.imshow(shares, cmap="Blues", norm=scale, interpolation="nearest")
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        right = int(np.trace(counts))
        all_rows = int(counts.sum())
        accuracy = 100 * right / all_rows if all_rows else math.nan
        axes.set_title(f"{right} of {all_rows} images right ({accuracy:.1f} %); share of each true class")
        _name_classes(axes, classes, font)
        if number <= _NUMBERS_UP_TO:
            _write_counts(axes, counts, shares)
        bar = figure.colorbar(image, ax=axes, shrink=0.5, pad=0.01, aspect=30)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        _list_confusions(side_axes, counts, totals[:, 0], classes)
    return figure


def _name_classes(axes: Axes, classes: Sequence[str], font: float) -> None:
    if len(classes) <= _NAMES_UP_TO:
        names = [name if len(name) <= 28 else name[:27] + "…" for name in classes]
        axes.set_xticks(range(len(names)), _literal(names), rotation=90, fontsize=font)
        axes.set_yticks(range(len(names)), _literal(names), fontsize=font)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(classes) <= 60:
        edges = np.arange(len(classes) + 1) - 0.5
        axes.set_xticks(edges, minor=True)
        axes.set_yticks(edges, minor=True)
        axes.grid(which="minor", color="#EDEDED", linewidth=0.6)
        axes.tick_params(which="minor", length=0)


def _write_counts(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    for row, column in np.argwhere(counts > 0):
        color = "white" if shares[row, column] > 0.4 else "#333333"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=color)


def _list_confusions(axes: Axes, counts: np.ndarray, totals: np.ndarray, classes: Sequence[str]) -> None:
    axes.axis("off")
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS_SHOWN]
    lines = []
    for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[row, column]:
            share = 100 * wrong[row, column] / totals[row]
            lines.append(
                f"{classes[row]}\n   taken for {classes[column]}: {wrong[row, column]} ({share:.0f} %)"
            )
    axes.set_title("Most frequent confusions" if lines else "No confusions", fontsize=10)
    text = "\n".join(_literal(lines))
    axes.text(0, 0.995, text, va="top", fontsize=9, linespacing=1.45, transform=axes.transAxes)


def _literal(texts: Sequence[str]) -> list[str]:
    """Class names are data: a dollar sign starts no formula."""
    return [text.replace("$", r"\$") for text in texts]


def _save(figure: Figure, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # never the user's screen

    FigureCanvasAgg(figure)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.15)
    temporary.replace(path)
    return path
