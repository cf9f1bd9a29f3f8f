"""Some classes for the run, the others kept out of it: what a network still tells apart is asked about those."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from mooring.data.manifest import SCHEMA, Manifest, Split
from mooring.errors import DataError


def seen_and_unseen(
    manifest: Manifest, *, classes: Sequence[str] | None = None, unseen: int | None = None, seed: int = 0
) -> tuple[Manifest, Manifest]:
    """The manifest of the classes that a run is about, and the one of all others.

    Rows keep their ids and splits; labels count within each of the two. ``unseen`` classes are the first of all in the
    order of ``sha256("unseen:seed:name")``, so that more of them contain fewer of the same seed.

    Args:
        manifest: of all classes.
        classes: those of the run, in any order; None: all but ``unseen``.
        unseen: how many to keep out.
        seed: another seed keeps out others.

    Raises:
        DataError: both or neither of classes and unseen, an unknown class, or fewer than two for the run, or none left.
    """
    if (classes is None) == (unseen is None):
        raise DataError(f"expected one of data.classes and data.unseen_classes; got {classes=}, {unseen=}")
    known = manifest.classes
    if classes is not None:
        strangers = sorted(set(classes) - set(known))
        if strangers:
            raise DataError(
                f"data.classes: expected classes of the data ({len(known)} of them); got {', '.join(strangers[:8])}"
            )
        left_out = set(known) - set(classes)
    else:
        assert unseen is not None
        left_out = set(sorted(known, key=lambda name: _rank(seed, name))[:unseen])
    seen = [name for name in known if name not in left_out]
    if len(seen) < 2 or not left_out:
        raise DataError(
            f"expected at least two classes for the run and one kept out of it; the data has {len(known)}, and "
            f"{len(seen)} would be for the run"
        )
    shown = ", ".join(sorted(left_out)[:8]) + (", ..." if len(left_out) > 8 else "")
    note = f"the run is about {len(seen)} of {len(known)} classes; kept out of it: {shown}"
    kept = _of_classes(manifest, seen)
    if "train" not in kept.counts or "val" not in kept.counts:
        raise DataError("expected training and validation images of the classes of the run; got none")
    return replace(kept, notes=(*manifest.notes, note)), _of_classes(
        manifest, [name for name in known if name in left_out]
    )


def _of_classes(manifest: Manifest, classes: Sequence[str]) -> Manifest:
    rows = manifest.table.filter(pc.field("label").isin(list(classes)))
    return replace(manifest, table=rows).with_classes(classes)


def all_splits(manifest: Manifest) -> Split:
    """Every image as one split: for images that nothing is trained or chosen on."""
    place = SCHEMA.get_field_index("split")
    names = pa.array(["test"] * len(manifest), SCHEMA.field(place).type)
    return replace(manifest, table=manifest.table.set_column(place, SCHEMA.field(place), names)).split("test")


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"unseen:{seed}:{name}".encode()).digest()
