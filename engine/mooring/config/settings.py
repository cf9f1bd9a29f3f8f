"""The base of every table of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of every settings table: unknown keys are refused, values are checked, never changed in place.

    Strict: ``true`` is no number and ``"20"`` is no integer. Fields that a TOML file can only write as
    another type (paths as text, tuples as lists) say ``strict=False`` one by one.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False
    )


def given_path(value: Any) -> Any:
    """The value, unless it is empty text, which would mean the working directory: for a validator ``mode="before"``.

    Raises:
        ValueError: it is.
    """
    if isinstance(value, str | Path) and not str(value).strip():
        raise ValueError("expected a path; got empty text (an unset shell variable?)")
    return value
