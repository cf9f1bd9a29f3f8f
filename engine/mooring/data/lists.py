"""CSV, TSV and Parquet lists (path, label, split) -> candidates."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mooring.data.columns import (
    LABEL_NAMES,
    PATH_NAMES,
    Columns,
    find_split,
    label_of,
    pick,
    split_of,
)
from mooring.data.discover import Candidate, Discovered, is_under
from mooring.data.parquet_limits import (
    TextBudget,
    check_parquet,
    long_columns,
    plain_text,
    rows_at_once,
    text_columns,
)
from mooring.data.quarantine import Quarantined, Reason
from mooring.errors import DataError
from mooring.parsing import parse_json

# header, rows of some columns, and the values of one column
_Rows = Callable[[list[str]], Iterator[Sequence[Any]]]
_Table = tuple[list[str], _Rows, Callable[[str], Iterable[object]]]

LIST_SUFFIXES = (".csv", ".tsv", ".parquet")
_DELIMITERS = {".csv": (",", ";", "\t"), ".tsv": ("\t", ",", ";")}  # the usual one first


def discover_list(source: Path, columns: Columns) -> Discovered:
    """Lists the rows of a table; relative paths start at the table's folder, which is the root.

    Raises:
        DataError: the file is no table or lacks a column.
    """
    root = source.resolve().parent
    found = Discovered(root, f"{source.suffix[1:].lower()} list")
    names, rows, values = _open_parquet(source) if source.suffix.lower() == ".parquet" else _open_text(source)
    path_name = pick(source, names, columns.image, PATH_NAMES, "path", "image_column")
    label_name = pick(source, names, columns.label, LABEL_NAMES, "label", "label_column")
    split_name = find_split(source, names, columns.split, values)
    found.splits_given = split_name is not None
    class_names = label_names(source, label_name) if source.suffix.lower() == ".parquet" else None
    wanted = [path_name, label_name, *([] if split_name is None else [split_name])]
    real_parents: dict[str, str] = {}
    for number, (path, label_value, *split_value) in enumerate(rows(wanted), 1):
        listed = str(path if path is not None else "").strip()
        label = label_of(label_value, class_names)
        if label is None:
            found.quarantined.append(Quarantined(listed, Reason.BAD_LABEL, f"label is {label_value!r}"))
            continue
        split = "train"
        if split_name is not None:
            split = split_of(source, split_value[0], split_name, number)
        relative = _relative(found, listed, real_parents)
        if relative is not None:
            found.candidates.append(Candidate(relative, label, split, listed))
    return found


def label_names(source: Path, column: str) -> list[str] | None:
    """Class names that a Hugging Face Parquet file carries for an integer label column."""
    blob = (pq.read_schema(source).metadata or {}).get(b"huggingface")
    if blob is None:
        return None
    try:
        names = parse_json(blob)["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _relative(found: Discovered, listed: str, real_parents: dict[str, str]) -> str | None:
    """The path below the root; None, and a quarantine row, where it is not below the root."""
    if not listed:
        found.quarantined.append(Quarantined(listed, Reason.MISSING, "the row names no file"))
        return None
    if "\0" in listed:
        found.quarantined.append(Quarantined(listed, Reason.BAD_NAME, "a zero byte in the path"))
        return None
    if os.name != "nt" and PureWindowsPath(listed).drive:
        found.quarantined.append(Quarantined(listed, Reason.OUTSIDE_ROOT, "a path with a drive letter"))
        return None
    full = os.path.normpath(
        found.root / PurePosixPath(listed.replace("\\", "/") if os.name == "nt" else listed)
    )
    if not is_under(full, found.root):
        found.quarantined.append(Quarantined(listed, Reason.OUTSIDE_ROOT, f"leads to {full}"))
        return None
    folder = os.path.dirname(full)  # noqa: PTH120 (a list may have millions of rows)
    if folder not in real_parents:
        real_parents[folder] = os.path.realpath(folder)
    is_link = os.path.islink(full)  # noqa: PTH114
    target = os.path.realpath(full) if is_link else real_parents[folder]
    if not is_under(target, found.root):
        found.quarantined.append(
            Quarantined(listed, Reason.SYMLINK_OUTSIDE, f"leads to {os.path.realpath(full)}")
        )
        return None
    return Path(full).relative_to(found.root).as_posix()


def _open_text(source: Path) -> _Table:
    try:
        text = source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise DataError(
            f"expected UTF-8 text in {source}; got a byte that is not ({err.reason}): save it as UTF-8"
        ) from None
    except OSError as err:
        raise DataError(f"cannot read {source}: {err.strerror}") from None
    try:
        delimiter = _delimiter(text, _DELIMITERS[source.suffix.lower()])
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        header = [name.strip() for name in next(reader)]
    except StopIteration:
        raise DataError(f"expected a header and rows in {source}; got an empty file") from None
    except csv.Error as err:
        raise DataError(f"expected a table in {source}; got {err}") from None
    rows = list(_text_rows(source, reader, len(header)))

    def some(wanted: list[str]) -> Iterator[Sequence[str]]:
        places = [header.index(name) for name in wanted]
        return ([row[place] for place in places] for row in rows)

    return header, some, lambda name: (row[header.index(name)] for row in rows)


def _delimiter(text: str, candidates: Sequence[str]) -> str:
    """The character that cuts the header into the most names; the first of the candidates where several do."""
    return max(
        candidates,
        key=lambda candidate: len(next(csv.reader(io.StringIO(text, newline=""), delimiter=candidate))),
    )


def _text_rows(source: Path, rows: Any, width: int) -> Iterator[Sequence[str]]:
    try:
        for row in rows:
            if not row:
                continue
            if len(row) != width:
                raise DataError(
                    f"expected {width} fields in line {rows.line_num} of {source}; got {len(row)}"
                )
            yield row
    except csv.Error as err:
        raise DataError(f"expected a table in {source}; line {rows.line_num}: {err}") from None


def _open_parquet(source: Path) -> _Table:
    table = open_parquet(source)
    return (
        list(table.schema_arrow.names),
        lambda wanted: _parquet_rows(source, table, wanted),
        lambda name: text_values(source, table, name),
    )


def text_values(source: Path, table: pq.ParquetFile, column: str) -> list[object]:
    """The different values of a text column; empty for a column of another type.

    Raises:
        DataError: the column cannot be read.
    """
    kind = table.schema_arrow.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return []
    found: dict[object, None] = {}
    for batch in parquet_batches(source, table, 8192, [column]):
        found |= dict.fromkeys(batch.column(0).to_pylist())
    return list(found)


def _parquet_rows(source: Path, table: pq.ParquetFile, wanted: list[str]) -> Iterator[Sequence[Any]]:
    for batch in parquet_batches(source, table, 8192, wanted):
        yield from zip(*(batch.column(name).to_pylist() for name in wanted), strict=True)


def parquet_batches(
    source: Path, table: pq.ParquetFile, rows: int, columns: list[str]
) -> Iterator[pa.RecordBatch]:
    """These columns in batches of at most ``rows``, each of them valid.

    Raises:
        DataError: a part of the file cannot be read, or unfolds to much more than it is.
    """
    try:
        size = source.stat().st_size
        check_parquet(source, table, columns, size)
        budget = TextBudget(source, size)
        long = long_columns(table.schema_arrow, columns)
        few = rows_at_once(table, long, rows)
        for group in range(table.num_row_groups):
            short = table.read_row_group(group, [name for name in columns if name not in long])
            short.validate(full=True)
            budget.take(short)
            short = plain_text(short)
            if not long:
                yield from short.to_batches(max_chunksize=rows)
                continue
            begin = 0
            for batch in table.iter_batches(few, row_groups=[group], columns=long):
                batch.validate(full=True)
                beside = short.slice(begin, batch.num_rows).combine_chunks()
                begin += batch.num_rows
                both = dict(zip(long, batch.columns, strict=True))
                both |= {name: beside.column(name).combine_chunks() for name in beside.schema.names}
                yield pa.RecordBatch.from_pydict({name: both[name] for name in columns})
    except (pa.ArrowException, OSError, UnicodeDecodeError) as err:
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise DataError(
            f"expected a whole Parquet file at {source}; got a damaged one ({reason}): copy it again"
        ) from None


def open_parquet(source: Path) -> pq.ParquetFile:
    """Opens a Parquet file, whose text is read as dictionaries, or says that it is none."""
    try:
        return pq.ParquetFile(source, read_dictionary=text_columns(pq.read_schema(source)))
    except (pa.ArrowException, OSError) as err:
        raise DataError(f"expected a Parquet file at {source}; got {str(err).splitlines()[0]}") from None
