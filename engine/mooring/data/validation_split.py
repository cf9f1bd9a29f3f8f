"""A stratified validation split made from train, the same on every machine and in every file order."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from mooring.errors import DataError


def validation_rows(labels: Sequence[str], digests: Sequence[str], fraction: float, seed: int) -> set[int]:
    """Row numbers of train that go to validation.

    Of each class with n distinct images, ``max(1, round(fraction * n))`` go to validation and at least
    one stays; a class with one image stays in train. Rows are ordered by ``sha256(seed:digest)``, so the
    choice depends on the bytes and the seed alone, and copies of one image never lie on both sides.

    Args:
        labels: class of each train row.
        digests: sha256 of each train row's bytes, hexadecimal.
        fraction: share of each class, in (0, 1).
        seed: another seed makes another split.

    Raises:
        DataError: the fraction or the seed is out of range, or no class has two images.
    """
    check_settings(fraction, seed)
    by_class: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, (label, digest) in enumerate(zip(labels, digests, strict=True)):
        by_class[label][digest].append(row)
    chosen: set[int] = set()
    taken: set[str] = set()
    for _, images in sorted(by_class.items()):
        count = min(max(1, round(fraction * len(images))), len(images) - 1)
        for digest in sorted(images, key=lambda digest: _rank(seed, digest))[:count]:
            taken.add(digest)
    # by digest, not by class: one picture under two labels must not lie on both sides either
    for images in by_class.values():
        for digest, rows in images.items():
            if digest in taken:
                chosen.update(rows)
    if not chosen:
        raise DataError(
            "a validation split cannot be made: no class has two different images. "
            "Add images, or give a val folder (or split column)"
        )
    return chosen


def check_settings(fraction: float, seed: int) -> None:
    """Refuses what no validation split can be made with.

    Raises:
        DataError: the fraction is not in (0, 1), or the seed is no whole number from 0 on.
    """
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise DataError(f"val_fraction must lie between 0 and 1; got {fraction!r}")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise DataError(f"expected a seed that is a whole number from 0 on; got {seed!r}")


def _rank(seed: int, digest: str) -> bytes:
    return hashlib.sha256(f"{seed}:{digest}".encode()).digest()
