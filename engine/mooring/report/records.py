"""Records: values as strict JSON, files that are either whole or absent."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from mooring.syncing import replace_durably

# JSON has no non-finite numbers; these words stand for them and are read back as floats.
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}\.partial")


def to_json_value(value: Any) -> Any:
    """``value`` in terms of strict JSON: non-finite numbers as words, paths as text, tensors as lists.

    Raises:
        TypeError: the value has no JSON form.
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)  # a numpy float64 is a float too, and json would print its repr
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return to_json_value(asdict(value))
    if (as_list := getattr(value, "tolist", None)) is not None:  # tensors and arrays, importing neither
        return to_json_value(as_list())
    raise TypeError(
        f"a record holds numbers, text, lists and tables; got {type(value).__name__}: {value!r:.80}"
    )


def from_json_number(value: Any) -> Any:
    """Turns the words for non-finite numbers back into floats; everything else stays."""
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def json_line(value: Any) -> str:
    """One line of JSON, without the line end."""
    return json.dumps(to_json_value(value), ensure_ascii=False, allow_nan=False)


def write_text_atomic(path: Path, text: str) -> None:
    """Writes ``path`` as a whole: a reader, or a crash, sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with temporary.open("x", encoding="utf-8") as file:  # with the modes that the umask leaves
            file.write(text)
        replace_durably(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_unfinished(name: str) -> bool:
    """Whether ``write_text_atomic`` made a file of this name, and left it there because the process was killed."""
    return _UNFINISHED.fullmatch(name) is not None


def write_json_atomic(path: Path, value: Any) -> None:
    """``value`` as indented strict JSON, written as a whole."""
    text = json.dumps(to_json_value(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, text + "\n")
