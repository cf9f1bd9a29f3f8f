"""Parquet files that unfold to much more than they are: refused by their footer, and never unfolded at once.

Two things make a small file large in memory: compression, whose result the footer tells for each column of each group
of rows; and dictionaries, which name one long value in a few bits for each row. The first is refused. Against the
second, text is read as a dictionary, whose entries are looked at before they are written out, and other long values
are read so few at a time that even all of them being the longest possible one is no harm.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mooring.errors import DataError

MOST_ROWS = 50_000_000
_ROWS_PER_BYTE = 8  # of a file that names a different image in each row, after any compression
LONGEST_TEXT = 1 << 16  # bytes of a path or label
_TEXT_ALWAYS, _TEXT_PER_BYTE = 64 << 20, 256  # bytes of text in all, and more for each byte of the file
_TEXT_PER_ROW = 8 << 10  # on average over a group of rows
_ALWAYS = 1 << 20  # bytes in a column of a group of rows that need no reason
_GROUP = 256 << 20  # bytes of pictures in a group of rows, however they were compressed
_RATIO = 8  # larger groups: bytes in memory for one in the file; pictures hardly shrink once more
_AT_ONCE = 256 << 20  # bytes of one batch at most; while it grows, it is there twice


def check_parquet(source: Path, table: pq.ParquetFile, columns: Iterable[str], size: int) -> None:
    """Looks at the footer, before anything is read.

    Args:
        source: for the message.
        table: the open file.
        columns: those that will be read.
        size: bytes of the file.

    Raises:
        DataError: it claims more rows, or longer columns, than a list or a table of pictures has.
    """
    footer = table.metadata
    if footer.num_rows > min(MOST_ROWS, 65_536 + _ROWS_PER_BYTE * size):
        raise DataError(
            f"expected a table of images in {source}; got {footer.num_rows:,} rows in {size:,} bytes: more than "
            f"{MOST_ROWS:,}, or so alike that they name no images; split it, or list each image once"
        )
    wanted = {name: table.schema_arrow.field(name).type for name in columns}
    for group in range(footer.num_row_groups):
        described = footer.row_group(group)
        for name, unfolded, packed in _columns(described):
            kind = wanted.get(name)
            if kind is None:
                continue
            if _is_binary(kind):
                allowed = max(_GROUP, _RATIO * min(packed, size))
            else:
                allowed = min(_ALWAYS + _TEXT_PER_ROW * described.num_rows, _text_in_all(size))
            if unfolded > allowed:
                raise DataError(
                    f"expected at most {allowed / 1e6:,.0f} MB in column {name!r} of {described.num_rows:,} rows of "
                    f"{source}; got {unfolded / 1e6:,.0f} MB, unfolded from {packed / 1e6:,.3f} MB: do not use it; "
                    "where it is your own, write smaller groups of rows (row_group_size=)"
                )


def long_columns(schema: pa.Schema, columns: Iterable[str]) -> list[str]:
    """Those of the columns of which one value may take any number of bytes, and is no entry of a dictionary."""
    kinds = {name: schema.field(name).type for name in columns}
    return [
        name
        for name, kind in kinds.items()
        if not (pa.types.is_primitive(kind) or pa.types.is_dictionary(kind))
    ]


def rows_at_once(table: pq.ParquetFile, long: Iterable[str], rows: int) -> int:
    """How many rows of the ``long_columns`` can be read together, at most ``rows``."""
    footer, names = table.metadata, set(long)
    groups = (_columns(footer.row_group(number)) for number in range(footer.num_row_groups))
    longest = max((unfolded for group in groups for name, unfolded, _ in group if name in names), default=0)
    return max(1, min(rows, _AT_ONCE // max(1, longest)))


def text_columns(schema: pa.Schema) -> list[str]:
    """What is to be read as dictionaries: ``pq.ParquetFile(read_dictionary=...)``."""
    return [
        field.name
        for field in schema
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    ]


def plain_text(table: pa.Table) -> pa.Table:
    """Text in place of its dictionaries, as the file means it."""
    for at, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type) and _is_text(field.type.value_type):
            table = table.set_column(at, field.name, table.column(at).cast(field.type.value_type))
    return table


class TextBudget:
    """Adds up what the text of a file comes to when each entry of a dictionary is made as often as rows name it.

    Args:
        source: for the message.
        size: bytes of the file.
    """

    def __init__(self, source: Path, size: int) -> None:
        self._source = source
        self._left = _text_in_all(size)

    def take(self, batch: pa.RecordBatch | pa.Table) -> None:
        """Looks at a part of the file, before its text is made.

        Raises:
            DataError: an entry is longer than any path or label, or all together are too much for the file.
        """
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if not pa.types.is_dictionary(column.type) or not _is_text(column.type.value_type):
                continue
            for part in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
                lengths = pc.call_function("binary_length", [part.dictionary])
                longest = pc.call_function("max", [lengths]).as_py() or 0
                self._left -= pc.call_function("sum", [lengths.take(part.indices)]).as_py() or 0
                if longest > LONGEST_TEXT or self._left < 0:
                    got = (
                        f"one of {longest:,}"
                        if longest > LONGEST_TEXT
                        else "much more of it than of the file itself"
                    )
                    raise DataError(
                        f"expected text of at most {LONGEST_TEXT:,} bytes in column {name!r} of {self._source}; got "
                        f"{got}: these are no paths and labels"
                    )


def _text_in_all(size: int) -> int:
    return _TEXT_ALWAYS + _TEXT_PER_BYTE * size


def _columns(group: pq.RowGroupMetaData) -> Iterable[tuple[str, int, int]]:
    """Name, bytes unfolded and bytes in the file of each column; the leaves of a nested one together."""
    found: dict[str, tuple[int, int]] = {}
    for i in range(group.num_columns):
        leaf = group.column(i)
        name = leaf.path_in_schema.partition(".")[0]
        unfolded, packed = found.get(name, (0, 0))
        found[name] = unfolded + leaf.total_uncompressed_size, packed + leaf.total_compressed_size
    return [(name, *sizes) for name, sizes in found.items()]


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _is_binary(kind: pa.DataType) -> bool:
    """Whether pictures may be in it."""
    return (
        pa.types.is_nested(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )
