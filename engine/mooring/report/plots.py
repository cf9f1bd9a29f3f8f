"""Pictures of a run, drawn from its records only: ``metrics.jsonl`` and ``confusion.json``."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mooring.errors import RunFolderError
from mooring.report.metrics import counted
from mooring.report.metrics_log import FILE_NAME, Record, read_metrics
from mooring.report.records import write_json_atomic
from mooring.report.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind eyes and in print.
_BLUE, _ORANGE, _GREEN, _GREY, _RED = "#0072B2", "#E69F00", "#009E73", "#8A8A8A", "#D55E00"
STYLE: dict[Any, Any] = {
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


# Tried in this order for characters that matplotlib's own font lacks, where they are installed.
_FALLBACK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
    "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC",
    "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic",
    "SimHei", "IPAGothic", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji",
)  # fmt: skip
_log = logging.getLogger(__name__)


def draw_run(
    folder: Path,
    confusion: Any | None = None,
    classes: Sequence[str] | None = None,
    split: str | None = None,
) -> list[Path]:
    """Draws ``curves.png`` and, where a confusion matrix is given or recorded, ``confusion.png``.

    Args:
        folder: the run folder.
        confusion: [C, C] counts (tensor, array or lists), row = true class; kept as ``confusion.json``.
            None: drawn from that file, where it is.
        classes: C names.
        split: which split the matrix counts; kept with it and named in the picture.

    Returns:
        The files written.

    Raises:
        RunFolderError: a record is damaged.
    """
    written = []
    if (folder / FILE_NAME).is_file():
        records = read_metrics(folder)
        if any(record.kind in ("train", "val") for record in records):
            written.append(_save(draw_curves(records, _recorded_best(folder)), folder / "curves.png"))
    record = folder / "confusion.json"
    if confusion is not None:
        names = list(classes) if classes is not None else [str(i) for i in range(len(confusion))]
        write_json_atomic(record, {"split": split, "classes": names, "counts": confusion})
    if record.is_file():
        kept = RunFolder(folder).read_json(record.name)
        try:
            figure = draw_confusion(np.asarray(kept["counts"]), kept["classes"], kept.get("split"))
        except (KeyError, TypeError, AttributeError, ValueError) as err:
            if confusion is not None:
                raise  # what was given is wrong, not what was kept
            raise RunFolderError(f"{record}: expected classes and [C, C] counts, got {err}") from None
        written.append(_save(figure, folder / "confusion.png"))
    return written


def _recorded_best(folder: Path) -> int | None:
    """The best epoch as the run's result tells it; None where there is no result yet."""
    if not (folder / "result.json").is_file():
        return None
    result = RunFolder(folder).read_json("result.json")
    best = result.get("best_epoch") if isinstance(result, dict) else None
    return best if isinstance(best, int) else None


def draw_curves(records: Iterable[Record], best_epoch: int | None = None) -> Figure:
    """Loss, accuracy and learning rate over the run, on one axis of epochs.

    Args:
        records: lines of the log, in order.
        best_epoch: the epoch to mark, from 0; None: the one with the highest top-1 on validation, of equals
            the one with the lowest loss, as a run chooses it.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = list(records)
    train = [record for record in records if record.kind == "train"]
    val = [record for record in records if record.kind == "val"]
    test = [record for record in records if record.kind == "test"]
    # epochs end where validation records stand; without any, the axis counts steps
    per_epoch = val[0].step / (val[0].epoch + 1) if val and val[0].step else 1.0
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 9), dpi=130, layout="constrained")
        loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1.4])
        for axes, title in ((loss, "Loss"), (accuracy, "Accuracy (%)"), (rate, "Learning rate")):
            axes.set_title(title)
        _draw_loss(loss, train, val, per_epoch)
        _draw_accuracy(accuracy, train, val, test, per_epoch)
        _mark_best(accuracy, val, per_epoch, best_epoch)
        _legend(accuracy)
        _widen(accuracy)
        _line(rate, train, "lr", per_epoch, _BLUE)
        rate.set_ylim(bottom=0)
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        rate.set_xlabel("epoch" if val else "optimizer step")
        rate.xaxis.set_major_locator(MaxNLocator(integer=True))
        end = max((math.ceil(record.step / per_epoch) for record in (*train, *val)), default=1)
        rate.set_xlim(0, 1.02 * max(end, 1))  # room for the marker at the end
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
        axes.plot(x, y, color=_BLUE, marker=_lone(x), markersize=4, label="train")
    _line(axes, val, "nll", per_epoch, _ORANGE, label="validation NLL")
    _legend(axes)


def _draw_accuracy(
    axes: Axes, train: Sequence[Record], val: Sequence[Record], test: Sequence[Record], per_epoch: float
) -> None:
    x, y = _series(train, "top1", per_epoch)
    if len(x):
        smooth = 100 * _smooth(y, max(1, len(y) // 30))
        axes.plot(x, smooth, color=_BLUE, alpha=0.6, marker=_lone(x), markersize=4, label="train top-1")
    _line(axes, val, "top1", per_epoch, _ORANGE, 100, label="validation top-1")
    _line(
        axes, val, "mean_per_class", per_epoch, _GREEN, 100, label="validation mean per class", linestyle="--"
    )
    _, tested = _series(test, "top1", per_epoch)
    if len(tested):
        axes.axhline(
            100 * tested[-1], color=_GREY, linewidth=1, linestyle=":", label=f"test {100 * tested[-1]:.1f} %"
        )


def _lone(x: np.ndarray) -> str:
    """A line of one point shows only by its marker."""
    return "o" if len(x) == 1 else ""


def _mark_best(axes: Axes, val: Sequence[Record], per_epoch: float, epoch: int | None) -> None:
    def order(record: Record) -> tuple[float, float]:
        loss = record.values.get("nll", math.inf)
        return record.values["top1"], -loss if math.isfinite(loss) else -math.inf

    known = [record for record in val if len(_series([record], "top1", per_epoch)[0])]
    best = next((record for record in known if record.epoch == epoch), None) or max(
        known, key=order, default=None
    )
    if best is not None:
        x, y = best.step / per_epoch, 100 * best.values["top1"]
        axes.plot(x, y, "o", markersize=9, markerfacecolor="none", color=_RED)
        label = f"best {y:.1f} %, epoch {best.epoch + 1}"
        axes.plot([], [], "o", markerfacecolor="none", color=_RED, label=label)


def _widen(axes: Axes) -> None:
    """At least two points of accuracy around all data: a wobble of one image must not fill the picture."""
    values = np.concatenate([np.ravel(line.get_ydata()) for line in axes.lines] or [np.empty(0)])
    if len(values):
        low, high = axes.get_ylim()
        axes.set_ylim(max(-1.0, min(low, values.min() - 2)), min(101.0, max(high, values.max() + 2)))


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean of [n] values; the window shrinks at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def draw_confusion(counts: np.ndarray, classes: Sequence[str], split: str | None = None) -> Figure:
    """Row-normalised confusion matrix; beside it the classes most often taken for each other, if any.

    Args:
        counts: [C, C], row = true class, column = predicted.
        classes: C names.
        split: what was counted, for the title.
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
    confusions = _confusions(counts, totals[:, 0], classes)
    with rc_context({**STYLE, "axes.grid": False, "font.family": _fonts()}):
        width = side + (5.2 if confusions else 2.2)
        figure = Figure(figsize=(width, side + 1.8), dpi=130, layout="constrained")
        if confusions:
            axes, side_axes = figure.subplots(1, 2, width_ratios=[side, 2.6])
            _list_confusions(side_axes, confusions)
        else:
            axes = figure.subplots()
        scale = PowerNorm(0.6, vmin=0, vmax=1)  # rare confusions of a good classifier stay visible
        image = axes.imshow(shares, cmap="Blues", norm=scale, interpolation="nearest")
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        right = int(np.trace(counts))
        all_rows = int(counts.sum())
        accuracy = 100 * right / all_rows if all_rows else math.nan
        where = f"{split} split: " if split else ""
        images = counted(all_rows, "image")
        axes.set_title(
            f"{where}{right} of {images} right ({accuracy:.1f} %)\nshade: share of each true class"
        )
        _name_classes(axes, classes, font)
        if number <= _NUMBERS_UP_TO:
            _write_counts(axes, counts, shares)
        bar = figure.colorbar(image, ax=axes, shrink=0.5, pad=0.01, aspect=30)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
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


def _confusions(counts: np.ndarray, totals: np.ndarray, classes: Sequence[str]) -> list[str]:
    """The most frequent ones in words."""
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
    return lines


def _list_confusions(axes: Axes, confusions: Sequence[str]) -> None:
    axes.axis("off")
    axes.set_title("Most frequent confusions", fontsize=10)
    text = "\n".join(_literal(confusions))
    axes.text(0, 0.995, text, va="top", fontsize=9, linespacing=1.45, transform=axes.transAxes)


def _fonts() -> list[str]:
    """Matplotlib's own font, then what is installed for the characters that it lacks."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in installed)]


def _literal(texts: Sequence[str]) -> list[str]:
    """Class names are data: a dollar sign starts no formula."""
    return [text.replace("$", r"\$") for text in texts]


def _save(figure: Figure, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # never the user's screen

    FigureCanvasAgg(figure)
    temporary = path.with_name(f".{path.name}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.15)
    temporary.replace(path)
    missing = [warning for warning in caught if "missing from" in str(warning.message)]
    if missing:  # one warning per character and pass otherwise
        _log.warning(
            "%s: no installed font has some characters of the class names, they are drawn as boxes; "
            "install a font that has them, such as Noto Sans CJK",
            path,
        )
    for other in caught:
        if other not in missing:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return path
