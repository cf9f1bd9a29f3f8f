"""Class names as a reader writes them, and the prompts made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mooring.data.class_table import class_rows
from mooring.errors import DataError


def readable_names(classes: Sequence[str], file: Path | None = None) -> list[str]:
    """A name to read for each class: from ``file``, else the class's own with blanks for underscores.

    Args:
        classes: as the manifest has them (folder names), by label.
        file: CSV or TSV of two columns, class and name, with or without a header "class,name".

    Raises:
        DataError: a class has no name, or two have the same.
    """
    names = [name.replace("_", " ").strip() for name in classes]
    if file is not None:
        table = _table(file)
        missing = [name for name in classes if not table.get(name, "").strip()]
        if missing:
            raise DataError(
                f"{file}: expected a name for each of the {len(classes)} classes; got none for "
                + ", ".join(missing[:10])
            )
        names = [table[name].strip() for name in classes]
    unnamed = [label for label, name in enumerate(names) if not any(letter.isalpha() for letter in name)]
    if unnamed:
        raise DataError(
            f"expected class names that can be read; got {', '.join(repr(classes[i]) for i in unnamed[:10])}: "
            "give them with method.class_names=FILE (two columns: class, name)"
        )
    double = [name for name, count in Counter(name.lower() for name in names).items() if count > 1]
    if double:
        raise DataError(
            f"expected a different name for each class; got {', '.join(double[:10])} more than once: the text could "
            "not tell them apart; give other names with method.class_names=FILE"
        )
    return names


def _table(file: Path) -> dict[str, str]:
    rows = class_rows(file, "method.class_names")
    short = next((row for row in rows if len(row) < 2), None)
    if short is not None:
        raise DataError(
            f"method.class_names: {file} must have two columns, class and name; got the row {short}"
        )
    return {row[0].strip(): row[1] for row in rows}


def prompts(names: Sequence[str], template: str) -> list[str]:
    """The template with each name in the place of ``{name}`` and its article in the place of ``{a}``."""
    return [template.replace("{a}", _article(name)).replace("{name}", name) for name in names]


def _article(name: str) -> str:
    return "an" if name[:1].lower() in "aeiou" else "a"
