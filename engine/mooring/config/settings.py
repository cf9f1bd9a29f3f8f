"""The base of every table of settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of every settings table: unknown keys are refused, values are checked, never changed in place.

    Strict: ``true`` is no number and ``"20"`` is no integer. Fields that a TOML file can only write as
    another type (paths as text, tuples as lists) say ``strict=False`` one by one.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False
    )
