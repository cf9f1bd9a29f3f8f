"""What a run does about steps that are not finite, jumps of the loss, and standing still."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mooring.config.settings import Settings


class HealthSettings(Settings):
    """How a run watches itself."""

    nonfinite: Literal["stop", "skip", "off"] = Field(
        default="stop",
        description="a loss or gradient that is not finite never reaches the weights; stop: save the state before it, "
        "with a diagnosis; skip: leave the step out; off: look at the logged loss only",
    )
    max_skips: int = Field(
        default=10, ge=1, description="nonfinite=skip: steps left out before the run stops"
    )
    spike: float | None = Field(
        default=6.0,
        gt=0,
        description="note a logged loss that many deviations above its running mean; none: off",
    )
    hang_after: float | None = Field(
        default=300.0,
        gt=0,
        description="seconds without any progress that are reported as a hang, with stacks; none: off",
    )
    hang_after_slow: float = Field(
        default=1800.0,
        gt=0,
        description="the same for the set-up, the first step, an export and a saved state, which may take long",
    )
    hang_abort: bool | None = Field(
        default=None,
        description="end the process after reporting a hang (exit code 74); none: where several train together",
    )
    compare_banks_every: int | None = Field(
        default=1000,
        ge=1,
        description="optimizer steps between comparisons of banks that ranks hold in common; none: off",
    )
