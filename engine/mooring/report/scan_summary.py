"""What ``mooring scan`` shows: images per class and split, files left out, notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from mooring.report.metrics import counted

if TYPE_CHECKING:
    from mooring.data.quarantine import Quarantined
    from mooring.data.scan import ScanReport

_CLASSES_SHOWN = 60
_FILES_SHOWN = 20


def scan_summary(report: ScanReport) -> list[RenderableType]:
    """The report as tables for the terminal; long lists are cut, and say so."""
    parts: list[RenderableType] = [_classes(report)]
    if report.quarantine:
        parts += ["", _left_out(report)]
    parts += [f"[yellow]note[/] {escape(note)}" for note in report.notes]
    if report.out is not None:
        folder = escape(str(report.out))
        parts.append(f"manifest: {folder}   train with  mooring train data={folder}")
    return parts


def left_out(quarantine: Sequence[Quarantined]) -> str:
    """One line: ``3 files left out: 2 not an image, 1 duplicate``."""
    reasons = Counter(row.reason.value for row in quarantine)
    each = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return f"{counted(len(quarantine), 'file')} left out: {each}"


def _classes(report: ScanReport) -> Table:
    manifest = report.manifest
    splits = list(manifest.counts)
    counts = Counter(
        zip(manifest.table["label"].to_pylist(), manifest.table["split"].to_pylist(), strict=True)
    )
    title = f"{counted(len(manifest), 'image')}, {counted(len(manifest.classes), 'class', 'classes')}"
    table = Table("class", title=title, title_justify="left", header_style="bold", show_footer=True)
    table.columns[0].footer = "all"
    for split in splits:
        table.add_column(split, footer=str(manifest.counts[split]), justify="right")
    for name in manifest.classes[:_CLASSES_SHOWN]:
        table.add_row(escape(name), *(str(counts[name, split]) for split in splits))
    if len(manifest.classes) > _CLASSES_SHOWN:
        table.add_row(f"... and {len(manifest.classes) - _CLASSES_SHOWN} more", *("" for _ in splits))
    return table


def _left_out(report: ScanReport) -> Table:
    title = left_out(report.quarantine)
    table = Table(title=escape(title), title_justify="left", header_style="bold")
    for column in ("file", "reason", "what was seen"):
        table.add_column(column, overflow="fold")
    for row in report.quarantine[:_FILES_SHOWN]:
        table.add_row(escape(row.path), row.reason.value, escape(row.detail))
    if len(report.quarantine) > _FILES_SHOWN:
        table.add_row(
            f"... and {len(report.quarantine) - _FILES_SHOWN} more", "", "all are in quarantine.csv"
        )
    return table
