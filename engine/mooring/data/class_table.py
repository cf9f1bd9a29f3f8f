"""Tables that say something of each class: CSV or TSV, the class folder first."""

from __future__ import annotations

import csv
from pathlib import Path

from mooring.errors import DataError


def class_rows(file: Path, setting: str) -> list[list[str]]:
    """The rows of the table that are not empty; tabs separate them where the first line has one, else commas.

    Args:
        file: as the user gave it.
        setting: the key that names it, for the message.

    Raises:
        DataError: it cannot be read as text.
    """
    try:
        text = file.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"{setting}: {file} cannot be read as text: {err}") from None
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    return [row for row in csv.reader(text.splitlines(), delimiter=delimiter) if row]
