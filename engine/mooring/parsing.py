"""JSON and TOML that anyone may have written: whatever is wrong with the text is one kind of error."""

from __future__ import annotations

import json
import tomllib
from typing import Any

# Nested deeper than anything this project writes; Python's parsers give up somewhere above.
_TOO_DEEP = "nested too deeply"


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or is nested too deeply for Python.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a TOML text.

    Raises:
        ValueError: it is none, or is nested too deeply for Python.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
