"""Settings of Soft Fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from mooring.config.settings import Settings, given_path


class SoftFineTuningSettings(Settings):
    """Soft Fine-tuning (arXiv 1909.02236): the loss of the old task is kept at first, and faded out."""

    name: Literal["soft_fine_tuning"] = "soft_fine_tuning"
    source: Literal["data", "distill"] = Field(
        default="data",
        description="data: cross-entropy of the source head on images of source_data; distill: without such images, "
        "the source head keeps its first answers on the target images",
    )
    source_data: Path | None = Field(
        default=None,
        strict=False,
        description="images of the task the weights were trained for: folder, list or manifest, as data.path",
    )
    source_classes: Path | None = Field(
        default=None,
        strict=False,
        description="CSV or TSV: class folder of source_data, class index of the source head; none: sorted classes, "
        "where there are as many as the head has",
    )
    source_images: int | None = Field(
        default=None, ge=1, description="a class-balanced choice of so many source images; none: all"
    )
    source_batch_size: int | None = Field(
        default=None, ge=1, description="B_S, source images of a step at weight 1; none: train.batch_size"
    )
    source_shrink: bool = Field(
        default=True,
        description="draw ceil(w B_S) source images a step, in eights, instead of B_S: the same loss on average",
    )
    w0: float = Field(default=1.0, ge=0, description="weight of the source loss at the start")
    soft_schedule: Literal["linear", "cosine", "poly", "exp", "step", "constant", "zero"] = Field(
        default="linear",
        description="how the weight falls to 0; constant: joint training; zero: plain fine-tuning",
    )
    soft_fraction: float = Field(
        default=1.0, gt=0, le=1, description="share of the run over which the weight falls"
    )
    soft_power: float = Field(default=2.0, gt=0, description="p of soft_schedule=poly")
    soft_until: float = Field(
        default=0.5, gt=0, le=1, description="tau_0 of soft_schedule=step, as a share of the fall"
    )
    soft_granularity: Literal["step", "epoch"] = Field(
        default="step", description="epoch: one weight per epoch, 0 in the last"
    )
    target_weight: Literal["one", "complement"] = Field(
        default="one", description="weight of the target loss: 1, or 1 - w (needs w0 <= 1)"
    )
    source_bn: Literal["auto", "frozen_stats", "eval", "shared", "joint"] = Field(
        default="auto",
        description="BatchNorm of the source images. frozen_stats: their batch statistics, running ones follow "
        "the target only; eval: the statistics of the start; shared: theirs, running ones follow both; joint: "
        "one batch with the target; auto: frozen_stats, eval beside daft",
    )
    distillation_temperature: float = Field(default=3.0, gt=0, description="T")

    _paths_are_given = field_validator("source_data", "source_classes", mode="before")(given_path)

    @model_validator(mode="after")
    def _fits_together(self) -> SoftFineTuningSettings:
        if self.source == "distill" and self.source_data is not None:
            raise ValueError(
                "source=distill reads no source images: leave source_data out, or take source=data"
            )
        if self.target_weight == "complement" and self.w0 > 1:
            raise ValueError(
                f"target_weight=complement needs w0 <= 1 (1 - w is the target's weight); got {self.w0}"
            )
        return self

    @property
    def ever_on(self) -> bool:
        """Whether the source loss has a weight in any step."""
        return self.soft_schedule != "zero" and self.w0 > 0
