"""A part of the training images: so many per class (few-shot), or a share of every class."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from dataclasses import replace

import pyarrow as pa

from mooring.data.manifest import Manifest
from mooring.errors import DataError


def training_subset(
    manifest: Manifest, *, shots: int | None = None, fraction: float | None = None, seed: int = 0
) -> Manifest:
    """The manifest with a part of its train rows; validation, test, ids and classes stay as they are.

    Of each class the first n images in the order of ``sha256("subset:seed:digest")`` are kept, so the choice
    depends on the bytes and the seed alone, and a larger part of the same seed contains every smaller one.
    n is ``shots``, or ``max(1, floor(fraction * count + 1/2))``. A class with fewer than ``shots`` images
    gives all it has, and a note names how many classes do.

    Args:
        manifest: with its validation split already made: validation never depends on the part.
        shots: images per class, >= 1.
        fraction: share of each class, in (0, 1].
        seed: another seed draws other images.

    Raises:
        DataError: both or neither of shots and fraction, or one out of its range.
    """
    if (shots is None) == (fraction is None):
        raise DataError(
            f"expected one of shots and fraction for a part of the training images; got {shots=}, {fraction=}"
        )
    if shots is not None and shots < 1:
        raise DataError(f"expected at least 1 image per class in shots; got {shots}")
    if fraction is not None and not 0 < fraction <= 1:
        raise DataError(f"expected a fraction above 0 and up to 1; got {fraction}")
    by_class: dict[str, list[int]] = defaultdict(list)
    splits, labels = manifest.table["split"].to_pylist(), manifest.table["label"].to_pylist()
    digests, paths = manifest.table["sha256"].to_pylist(), manifest.table["path"].to_pylist()
    for row, (split, label) in enumerate(zip(splits, labels, strict=True)):
        if split == "train":
            by_class[label].append(row)
    kept: set[int] = set()
    short = []
    for label, rows in by_class.items():
        wanted = shots if shots is not None else max(1, math.floor(_share(fraction) * len(rows) + 0.5))
        if shots is not None and len(rows) < shots:
            short.append(label)
        # the path decides between copies of one image, where a scan kept both
        kept.update(sorted(rows, key=lambda row: (_rank(seed, digests[row]), paths[row]))[:wanted])
    keep = [split != "train" or row in kept for row, split in enumerate(splits)]
    what = f"{shots} per class" if shots is not None else f"a share of {fraction} of each class"
    notes = [
        f"training uses {len(kept)} of {splits.count('train')} training images: {what}, drawn with seed {seed}"
    ]
    if short:
        shown = ", ".join(sorted(short)[:5]) + (", ..." if len(short) > 5 else "")
        notes.append(
            f"{len(short)} of {len(by_class)} classes have fewer than {shots} training images and give all: {shown}"
        )
    table = manifest.table.filter(pa.array(keep, pa.bool_()))
    return replace(manifest, table=table, notes=(*manifest.notes, *notes))


def _share(fraction: float | None) -> float:
    assert fraction is not None  # one of the two is given
    return fraction


def _rank(seed: int, digest: str) -> bytes:
    # not the order of the validation split, which took the first images of its own order away
    return hashlib.sha256(f"subset:{seed}:{digest}".encode()).digest()
