"""Parquet with image bytes and labels: the bytes become plain files, so that every source reads files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa

from mooring.data.columns import (
    IMAGE_NAMES,
    LABEL_NAMES,
    Columns,
    find,
    find_split,
    label_of,
    pick,
    split_of,
)
from mooring.data.discover import Candidate, Discovered
from mooring.data.images import extension
from mooring.data.lists import label_names, open_parquet, parquet_batches, text_values
from mooring.data.quarantine import Quarantined, Reason
from mooring.errors import DataError, RunFolderError

EMBEDDED = "Parquet with image bytes"  # kind of such a source
_ROWS_AT_ONCE = 64  # bounds memory: whole photos lie in these rows


def image_column(source: Path, wanted: str | None) -> str | None:
    """Name of the column with image bytes; None where there is none (the file is then a list of paths)."""
    schema = open_parquet(source).schema_arrow
    binary = [field.name for field in schema if _holds_bytes(field.type)]
    if wanted is not None:
        return wanted if wanted in binary else None
    usual = find(source, binary, None, IMAGE_NAMES, "image_column")
    return usual if usual is not None else (binary[0] if len(binary) == 1 else None)


def extract(source: Path, out: Path, columns: Columns) -> Discovered:
    """Writes each row's bytes to ``out/images/<sha256 prefix>.<ext>`` and lists the files.

    Rows with the same bytes share one file.

    Raises:
        DataError: a column is missing.
        RunFolderError: ``out`` cannot be written.
    """
    table = open_parquet(source)
    names = list(table.schema_arrow.names)
    column = image_column(source, columns.image)
    if column is None:
        raise DataError(f"expected a column with image bytes in {source}; got columns {', '.join(names)}")
    label_column = pick(source, names, columns.label, LABEL_NAMES, "label", "label_column")
    split_column = find_split(source, names, columns.split, lambda name: text_values(source, table, name))
    class_names = label_names(source, label_column)
    found = Discovered(out.resolve(), EMBEDDED, splits_given=split_column is not None)
    row = 0
    try:
        (out / "images").mkdir(parents=True, exist_ok=True)
        wanted = [column, label_column, *([split_column] if split_column else [])]
        for batch in parquet_batches(source, table, _ROWS_AT_ONCE, wanted):
            images, labels = batch.column(column), batch.column(label_column)
            splits = batch.column(split_column) if split_column else None
            for i in range(batch.num_rows):
                listed_as = f"{source.name}#row{row}"
                row += 1
                label = label_of(labels[i].as_py(), class_names)
                data = _bytes_of(images[i].as_py())
                if label is None:
                    detail = f"label is {labels[i].as_py()!r}"
                    found.quarantined.append(Quarantined(listed_as, Reason.BAD_LABEL, detail))
                elif not data:
                    found.quarantined.append(Quarantined(listed_as, Reason.EMPTY, "no bytes in this row"))
                else:
                    split = "train"
                    if splits is not None and split_column is not None:
                        split = split_of(source, splits[i].as_py(), split_column, row)
                    found.candidates.append(Candidate(_store(out, data), label, split, listed_as))
    except OSError as err:
        raise RunFolderError(f"cannot write images to {out}: {err.strerror}: give another folder") from None
    return found


def _store(out: Path, data: bytes) -> str:
    relative = f"images/{hashlib.sha256(data).hexdigest()[:32]}.{extension(data)}"
    file = out / relative
    if not (file.is_file() and file.stat().st_size == len(data)):
        file.write_bytes(data)
    return relative


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):  # Hugging Face: struct<bytes, path>
        return any(
            kind.field(i).name == "bytes" and _holds_bytes(kind.field(i).type) for i in range(kind.num_fields)
        )
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _bytes_of(value: Any) -> bytes | None:
    return value.get("bytes") if isinstance(value, dict) else value
