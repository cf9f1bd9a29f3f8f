"""The manifest: which images a run uses, with label, split and digest; the ids of everything later.

On disk a folder: ``manifest.parquet`` (rows), ``manifest.json`` (root, classes, counts, digest) and
``quarantine.csv``. A row's id is its number, and stays with the image in every run, rank and loader.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mooring.data.discover import SPLITS, is_under
from mooring.data.parquet_limits import TextBudget, check_parquet, plain_text, text_columns
from mooring.data.quarantine import Quarantined, read_quarantine, write_quarantine
from mooring.errors import DataError, RunFolderError
from mooring.parsing import parse_json
from mooring.regular_file import open_regular, read_regular
from mooring.syncing import make_folder, replace_durably

VERSION = 1
ROWS_FILE, HEAD_FILE, QUARANTINE_FILE = "manifest.parquet", "manifest.json", "quarantine.csv"

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("path", pa.string()),  # relative to the root, forward slashes
        ("label", pa.string()),
        ("class", pa.int64()),  # index of the label in the class list
        ("split", pa.string()),
        ("width", pa.int64()),  # pixels, upright
        ("height", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("format", pa.string()),
        ("mode", pa.string()),  # as stored, Pillow's name
        ("native", pa.bool_()),  # every decoder gives the same pixels
        ("mtime_ns", pa.int64()),  # spares hashing a file that was not touched; not part of the digest
    ]
)
_DIGESTED = tuple(name for name in SCHEMA.names if name != "mtime_ns")


@dataclass(frozen=True)
class Split:
    """The rows of one split, as columns.

    Attributes:
        name: ``train``, ``val`` or ``test``.
        root: folder that ``paths`` are relative to.
        classes: class names; a label is an index into them.
        digest: of the manifest and the split's name; a saved loader state belongs to one digest.
        ids, labels: [n] int64.
        sizes: [n, 2] int64, upright (width, height) in pixels.
        native: [n] bool, every decoder gives the same pixels.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    digest: str
    ids: np.ndarray
    labels: np.ndarray
    paths: list[str] = field(repr=False)
    sizes: np.ndarray = field(repr=False)
    byte_counts: np.ndarray = field(repr=False)
    mtimes: np.ndarray = field(repr=False)
    sha256: list[str] = field(repr=False)
    native: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def file(self, position: int) -> Path:
        """Path of the row at a position of this split (not a manifest id)."""
        return self.root / self.paths[position]


@dataclass(frozen=True)
class Manifest:
    """Rows of all splits (train, then val, then test) and what is known about them.

    Attributes:
        root: folder that the rows' paths are relative to.
        classes: class names, sorted by code point unless they were given; the class index is the place
            in this list.
        table: rows, see ``SCHEMA``.
        source: what was scanned: kind, path.
        notes: what a user should know, one sentence each.
        made_validation: how the validation split was made from train; None where one was given.
        quarantine: the files that were left out, with a reason each; not part of the digest.
    """

    root: Path
    classes: tuple[str, ...]
    table: pa.Table
    source: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    made_validation: dict[str, Any] | None = None
    quarantine: tuple[Quarantined, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def digest(self) -> str:
        """sha256 over classes and rows; the root and file times are not part of it."""
        total = hashlib.sha256(json.dumps([VERSION, list(self.classes)]).encode())
        for batch in self.table.select(_DIGESTED).to_batches(max_chunksize=8192):
            columns = [column.to_pylist() for column in batch.columns]
            total.update(json.dumps(columns, ensure_ascii=True).encode())
        return total.hexdigest()

    @cached_property
    def counts(self) -> dict[str, int]:
        """Images per split; splits without images are not named."""
        splits = self.table["split"].to_pylist()
        return {name: count for name in SPLITS if (count := splits.count(name))}

    def split(self, name: str) -> Split:
        """The rows of one split.

        Raises:
            DataError: there is no such split.
        """
        if name not in self.counts:
            raise DataError(
                f"expected a split {' or '.join(self.counts)}; got {name!r}, which has no images here"
            )
        rows = self.table.filter(pc.field("split") == name)
        sizes = np.stack([_numbers(rows, "width"), _numbers(rows, "height")], axis=1)
        return Split(
            name=name,
            root=self.root,
            classes=self.classes,
            digest=hashlib.sha256(f"{self.digest}:{name}".encode()).hexdigest(),
            ids=_numbers(rows, "id"),
            labels=_numbers(rows, "class"),
            paths=rows["path"].to_pylist(),
            sizes=sizes,
            byte_counts=_numbers(rows, "bytes"),
            mtimes=_numbers(rows, "mtime_ns"),
            sha256=rows["sha256"].to_pylist(),
            native=np.asarray(rows["native"].to_pylist(), dtype=bool),
        )

    def with_classes(self, classes: Sequence[str]) -> Manifest:
        """The same rows with class indices into ``classes``: how other data is measured with a run's classes.

        Raises:
            DataError: a label is not among them.
        """
        labels = self.table["label"].to_pylist()
        check_labels(labels, classes, self.source.get("path", str(self.root)))
        index = {name: place for place, name in enumerate(classes)}
        place = SCHEMA.get_field_index("class")
        values = pa.array([index[label] for label in labels], SCHEMA.field(place).type)
        table = self.table.set_column(place, SCHEMA.field(place), values)
        return replace(self, classes=tuple(classes), table=table)

    def save(self, folder: Path) -> None:
        """Writes the manifest folder, file by file and each whole; what is the same already is left as it is.

        Raises:
            RunFolderError: the folder cannot be written.
        """
        head = {
            "version": VERSION,
            "root": "." if self.root == folder.resolve() else str(self.root),
            "classes": list(self.classes),
            "counts": self.counts,
            "digest": self.digest,
            "made_validation": self.made_validation,
            "source": self.source,
            "notes": list(self.notes),
            "quarantined": len(self.quarantine),
        }
        text = json.dumps(head, indent=1, ensure_ascii=False) + "\n"
        # the head last: a new folder that has one is whole, and of a mixed one it tells another digest
        names = (ROWS_FILE, QUARANTINE_FILE, HEAD_FILE)
        parts = {name: folder / f"{name}.part" for name in names}
        try:
            make_folder(folder)
            pq.write_table(self.table, parts[ROWS_FILE])
            write_quarantine(parts[QUARANTINE_FILE], self.quarantine)
            parts[HEAD_FILE].write_text(text, encoding="utf-8")
            for name, part in parts.items():
                if (folder / name).is_file() and filecmp.cmp(part, folder / name, shallow=False):
                    part.unlink()
                else:
                    replace_durably(part, folder / name)
        except OSError as err:
            raise RunFolderError(
                f"cannot write the manifest to {folder}: {err.strerror or err}: give another folder"
            ) from None

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads a manifest folder and checks it: version, digest, and that every path stays under the root.

        Raises:
            DataError: the folder holds no manifest, or one that was changed by hand.
        """
        head = _read_head(folder)
        if head.get("version") != VERSION:
            raise DataError(
                f"expected manifest version {VERSION} in {folder}; got {head.get('version')}: scan again"
            )
        try:
            table = _read_rows(folder / ROWS_FILE)
            root = (folder / head["root"]).resolve()
            manifest = cls(
                root=root,
                classes=tuple(head["classes"]),
                table=table,
                source=dict(head["source"]),
                notes=tuple(str(note) for note in head["notes"]),
                made_validation=head["made_validation"],
                quarantine=tuple(load_quarantine(folder)),
            )
        except DataError:
            raise
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as err:
            raise DataError(
                f"expected a whole manifest in {folder}; got {type(err).__name__}: {err}: scan again"
            ) from None
        if manifest.digest != head.get("digest"):
            raise DataError(
                f"expected rows with digest {str(head.get('digest'))[:12]} in {folder}; got "
                f"{manifest.digest[:12]}: the manifest was changed after the scan; scan again"
            )
        _check_rows(manifest, folder)
        _check_under_root(table["path"].to_pylist(), root, folder)
        return manifest

    @staticmethod
    def is_manifest(folder: Path) -> bool:
        """Whether the folder looks like a saved manifest."""
        return (folder / HEAD_FILE).is_file() and (folder / ROWS_FILE).is_file()


def load_quarantine(folder: Path) -> list[Quarantined]:
    """The quarantine list saved beside a manifest."""
    return read_quarantine(folder / QUARANTINE_FILE)


def check_labels(labels: Iterable[str], classes: Sequence[str], source: object) -> None:
    """Refuses labels that are not among the classes.

    Raises:
        DataError: naming them.
    """
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        shown = ", ".join(repr(name) for name in unknown[:8])
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise DataError(
            f"expected only classes that the run knows ({len(classes)} of them) in {source}; got {shown}{more}: "
            "rename them as in the run, or take them out"
        )


def scanned_path(folder: Path) -> str | None:
    """What the manifest in a folder is the scan of; None where there is no readable manifest."""
    try:
        return str(_read_head(folder)["source"]["path"])
    except (DataError, KeyError, TypeError):
        return None


def _read_head(folder: Path) -> dict[str, Any]:
    try:
        head = parse_json(read_regular(folder / HEAD_FILE))
    except FileNotFoundError:
        raise DataError(
            f"expected a manifest folder with {HEAD_FILE}; got {folder}, which has none"
        ) from None
    except (OSError, ValueError) as err:
        raise DataError(f"expected JSON in {folder / HEAD_FILE}; got {err}: scan again") from None
    if not isinstance(head, dict):
        raise DataError(f"expected an object in {folder / HEAD_FILE}; got {type(head).__name__}: scan again")
    return head


def _read_rows(file: Path) -> pa.Table:
    with open_regular(file) as stream:
        schema = pq.read_schema(stream)
        if schema.names != SCHEMA.names or schema.types != SCHEMA.types:
            raise DataError(f"expected the columns of a manifest in {file}; got others: scan again")
        table = pq.ParquetFile(stream, read_dictionary=text_columns(schema))
        size = os.fstat(stream.fileno()).st_size
        check_parquet(file, table, schema.names, size)
        rows = table.read()
    rows.validate(full=True)
    TextBudget(file, size).take(rows)
    return plain_text(rows).cast(SCHEMA)


def _check_rows(manifest: Manifest, folder: Path) -> None:
    """A digest tells that the rows are those that were signed, not that they make sense to whoever reads them."""
    table, classes = manifest.table, manifest.classes
    if not all(isinstance(name, str) for name in classes) or len(set(classes)) != len(classes):
        raise DataError(f"expected a list of different class names in {folder}; got others: scan again")
    gaps = [name for name in SCHEMA.names if table[name].null_count]
    sizes = [table[name].to_numpy() for name in ("width", "height")]
    wrong = (
        {
            # a part of a scan keeps the ids of the whole
            "id": bool((np.diff(table["id"].to_numpy(), prepend=-1) < 1).any()),
            "class or label": [
                classes[c] if 0 <= c < len(classes) else None for c in table["class"].to_pylist()
            ]
            != table["label"].to_pylist(),
            "split": not set(table["split"].to_pylist()) <= set(SPLITS),
            "width or height": any(bool((side < 1).any()) for side in sizes),
            "bytes": bool((table["bytes"].to_numpy() < 1).any()),
        }
        if not gaps
        else dict.fromkeys(gaps, True)
    )
    if any(wrong.values()):
        raise DataError(
            f"expected rows of a scan in {folder / ROWS_FILE}; got impossible values in the column "
            f"{', '.join(name for name, is_wrong in wrong.items() if is_wrong)}: scan again"
        )


def _check_under_root(paths: list[str], root: Path, folder: Path) -> None:
    """A manifest may come from elsewhere: no row of it may lead out of the root, by name or by link."""
    real_parents: dict[str, str] = {}
    for path in paths:
        parent, _, name = path.rpartition("/")
        full = os.path.join(root, parent)  # noqa: PTH118 (a manifest may have millions of rows)
        if parent not in real_parents:
            real_parents[parent] = os.path.realpath(full)
        file = os.path.join(full, name)  # noqa: PTH118
        target = os.path.realpath(file) if os.path.islink(file) else real_parents[parent]  # noqa: PTH114
        if name in ("", ".", "..") or path.startswith("/") or "\\" in name or not is_under(target, root):
            raise DataError(
                f"expected paths under {root} in the manifest {folder}; got {path!r}, which leads elsewhere: "
                "do not use this manifest, scan again"
            )


def _numbers(rows: pa.Table, name: str) -> np.ndarray:
    return rows[name].to_numpy().astype(np.int64)
