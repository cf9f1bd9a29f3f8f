"""Which column of a table is the path, the image, the label and the split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mooring.data.discover import SPLIT_NAMES
from mooring.errors import DataError

PATH_NAMES = ("path", "file", "filename", "file_name", "filepath", "image_path", "image")
IMAGE_NAMES = ("image", "image_data", "image_bytes", "img", "jpg", "jpeg", "png", "bytes", "data")
LABEL_NAMES = (
    "label",
    "class",
    "class_name",
    "category",
    "target",
    "fine_label",
    "finegrained_cat",
    "label_name",
    "labels",
    "y",
)
SPLIT_COLUMN_NAMES = ("split", "subset", "partition")
AMBIGUOUS_SPLIT_NAMES = ("dataset", "fold")  # the split only where every value is a split's name


@dataclass(frozen=True, slots=True)
class Columns:
    """Explicit column names; None: found by the usual names."""

    image: str | None = None
    label: str | None = None
    split: str | None = None


def pick(
    file: Path, names: Sequence[str], wanted: str | None, usual: Sequence[str], what: str, argument: str
) -> str:
    """The column called ``wanted``, or the first of the usual names that is there.

    Raises:
        DataError: there is no such column.
    """
    found = find(file, names, wanted, usual, argument)
    if found is None:
        raise DataError(
            f"expected a column with the {what} in {file} (one of {', '.join(usual)}); "
            f"got columns {', '.join(names) or '(none)'}: name it with {_spellings(argument)}"
        )
    return found


def find(
    file: Path, names: Sequence[str], wanted: str | None, usual: Sequence[str], argument: str
) -> str | None:
    """As ``pick``, but None where none of the usual names is there."""
    if wanted is not None:
        if wanted not in names:
            raise DataError(
                f"expected a column {wanted!r} in {file}; got columns {', '.join(names)}: fix {_spellings(argument)}"
            )
        return wanted
    by_lower = {name.lower().strip(): name for name in reversed(names)}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def find_split(
    file: Path, names: Sequence[str], wanted: str | None, values: Callable[[str], Iterable[object]]
) -> str | None:
    """The split column; None where there is none.

    Args:
        file, names, wanted: as ``find``.
        values: what a column holds; asked only for columns whose name alone does not tell.
    """
    found = find(file, names, wanted, SPLIT_COLUMN_NAMES, "split_column")
    if found is not None:
        return found
    for usual in AMBIGUOUS_SPLIT_NAMES:
        name = find(file, names, None, (usual,), "split_column")
        if name is not None:
            held = {_split_name(value) for value in values(name)}
            if held and None not in held:
                return name
    return None


def split_of(file: Path, value: object, column: str, row: int) -> str:
    """``train``, ``val`` or ``test`` for a value of the split column.

    Args:
        file, column, row: where the value is, for the message; the first row is 1.
    """
    split = _split_name(value)
    if split is None:
        raise DataError(
            f"expected train, val or test in column {column!r} of {file}; got {value!r} in row {row}: "
            f"correct it, or name another column with {_spellings('split_column')}"
        )
    return split


def _split_name(value: object) -> str | None:
    return SPLIT_NAMES.get(str(value).strip().lower())


def _spellings(argument: str) -> str:
    """How a column is named to ``mooring scan`` and to ``mooring train``."""
    return f"--{argument.replace('_', '-')} (scan) or data.{argument}= (train)"


def label_of(value: object, names: Sequence[str] | None = None) -> str | None:
    """Class name for a value of the label column; None where it names no class."""
    if value is None or value != value or isinstance(value, bytes | list | dict):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with a gap is read as floats
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return str(value).strip() or None
