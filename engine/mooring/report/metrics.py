"""How each metric is called and shown: one place for tables, progress lines and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        label: for people.
        kind: ``share`` in [0, 1], shown in percent; ``rate`` per second; ``number``.
        better: which direction is good, where there is one.
    """

    label: str
    kind: str = "number"
    better: str | None = None

    def show(self, value: float) -> str:
        """``value`` with the digits that mean something."""
        if not math.isfinite(value):
            return str(value)
        if self.kind == "share":
            return f"{100 * value:.1f} %"
        if self.kind == "rate":
            return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


METRICS: Mapping[str, Metric] = {
    "loss": Metric("loss", better="low"),
    "top1": Metric("top-1", "share", "high"),
    "top5": Metric("top-5", "share", "high"),
    "mean_per_class": Metric("mean per class", "share", "high"),
    "ece": Metric("calibration error", "share", "low"),
    "nll": Metric("NLL", better="low"),
    "feature_cosine": Metric("cosine"),
    "feature_distance": Metric("distance"),
    "unseen_recall_at_1": Metric("unseen Recall@1", "share", "high"),
    "unseen_nearest_mean": Metric("unseen nearest mean", "share", "high"),
    "source_top1": Metric("source top-1", "share", "high"),
    "images_per_second": Metric("images/s", "rate", "high"),
}


def metric(name: str) -> Metric:
    """The metric of that name; an unknown one is a plain number under its own name."""
    return METRICS.get(name, Metric(name.replace("_", " ")))


def shown_metrics(names: Sequence[str], classes: int | None) -> list[str]:
    """``names`` without those that say nothing: top-5 of five classes or fewer is 100 % for any model.

    Args:
        names: metrics.
        classes: C; None where unknown.
    """
    return [name for name in names if name != "top5" or classes is None or classes > 5]


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """``1 file``, ``2 files``."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3700`` -> ``1:01:40``."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
