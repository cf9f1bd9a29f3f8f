"""Images of the task that pretrained weights were trained for, with the labels of their classifier."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mooring.data.class_table import class_rows
from mooring.data.manifest import Manifest, Split
from mooring.errors import DataError


def source_split(
    manifest: Manifest,
    head_classes: int,
    *,
    classes_file: Path | None = None,
    split: str = "train",
    without: Collection[str] = (),
    images: int | None = None,
    seed: int = 0,
) -> Split:
    """One split of the source data, its labels being class indices of the source head.

    Args:
        manifest: of the source data.
        head_classes: C_S.
        classes_file: CSV or TSV: class folder, class index, and perhaps more columns; with or without a header.
            None: the classes in sorted order, where they are C_S.
        split: which one.
        without: sha256 of images to leave out, those of the target task.
        images: how many to choose, as evenly over the classes as they allow; None: all.
        seed: of that choice.

    Raises:
        DataError: the classes cannot be mapped, or no image is left.
    """
    indices = class_indices(manifest.classes, head_classes, classes_file)
    rows = manifest.split(split)
    labels = np.asarray(indices, dtype=np.int64)[rows.labels]
    left_out = set(without)
    kept = np.asarray([place for place, digest in enumerate(rows.sha256) if digest not in left_out], np.int64)
    if len(kept) == 0:
        raise DataError(
            f"method.source_data: every image of {manifest.root} is also an image of the target data: "
            "take the images that the weights were trained on"
        )
    if images is not None and images < len(kept):
        kept = np.sort(kept[_balanced(labels[kept], images, seed)])
    labels = labels[kept]
    digest = hashlib.sha256(rows.digest.encode() + kept.tobytes() + labels.tobytes()).hexdigest()
    names = [""] * head_classes
    for name, index in zip(manifest.classes, indices, strict=True):
        names[index] = name
    return replace(
        rows,
        classes=tuple(names),
        digest=digest,
        ids=rows.ids[kept],
        labels=labels,
        paths=[rows.paths[place] for place in kept],
        sizes=rows.sizes[kept],
        byte_counts=rows.byte_counts[kept],
        mtimes=rows.mtimes[kept],
        sha256=[rows.sha256[place] for place in kept],
        native=rows.native[kept],
    )


def class_indices(classes: Sequence[str], head_classes: int, file: Path | None) -> list[int]:
    """Class index of the source head for each class of the source data.

    Raises:
        DataError: there is none for a class, or one that the head does not have.
    """
    if file is None:
        if len(classes) != head_classes:
            raise DataError(
                f"method.source_data has {len(classes)} classes and the classifier of the weights {head_classes}: say "
                "which is which with method.source_classes=FILE (CSV or TSV: class folder, class index)"
            )
        if all(name.isdecimal() and name.isascii() for name in classes):  # "10" comes after "9"
            order = sorted(classes, key=int)
        else:
            order = sorted(classes)
        return [order.index(name) for name in classes]
    table = _table(file)
    missing = [name for name in classes if name not in table]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise DataError(
            f"method.source_classes: {file} must name every class of method.source_data; it lacks "
            f"{', '.join(missing[:8])}{more}"
        )
    outside = [f"{name} -> {table[name]}" for name in classes if not 0 <= table[name] < head_classes]
    if outside:
        raise DataError(
            f"method.source_classes: {file}: expected indices 0 to {head_classes - 1}, the classes of the weights' "
            f"classifier; got {', '.join(outside[:8])}"
        )
    return [table[name] for name in classes]


def _table(file: Path) -> dict[str, int]:
    rows = class_rows(file, "method.source_classes")
    if rows and len(rows[0]) > 1 and not _is_index(rows[0][1]):
        del rows[0]  # a header
    bad = next((row for row in rows if len(row) < 2 or not _is_index(row[1])), None)
    if bad is not None or not rows:
        raise DataError(
            f"method.source_classes: {file} must have the columns class folder and class index (a number from 0); "
            f"got {'no rows' if bad is None else f'the row {bad}'}"
        )
    return {row[0].strip(): int(row[1]) for row in rows}


def _is_index(text: str) -> bool:
    return text.strip().isascii() and text.strip().isdecimal()


def _balanced(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Places of ``count`` rows: first one of each class, then a second one, and so on, drawn by ``seed``."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    seen: dict[int, int] = {}
    turn = np.empty(len(labels), np.int64)
    for place in shuffled:
        label = int(labels[place])
        turn[place] = seen[label] = seen.get(label, -1) + 1
    return shuffled[np.argsort(turn[shuffled], kind="stable")][:count]
