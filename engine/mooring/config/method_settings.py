"""Settings of each fine-tuning method: what a user may write under ``method.``"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from mooring.config.baseline_settings import (
    BSSSettings,
    CoTuningSettings,
    DELTASettings,
    FeatureDistillationSettings,
    FeatureMapSettings,
    L2SPSettings,
    LwFSettings,
    StochNormSettings,
)
from mooring.config.concept_settings import ConceptTuningSettings
from mooring.config.contrast_settings import BiTuningSettings, CoreTuningSettings
from mooring.config.daft_settings import DAFTSettings
from mooring.config.settings import Settings
from mooring.config.soft_settings import SoftFineTuningSettings
from mooring.config.tes_settings import TeSSettings


class FineTuneSettings(Settings):
    """Plain fine-tuning: cross-entropy on the new task, nothing else."""

    name: Literal["fine_tune"] = "fine_tune"


class LinearProbeSettings(Settings):
    """Frozen encoder; only the head is trained."""

    name: Literal["linear_probe"] = "linear_probe"


class LPFTSettings(Settings):
    """Linear probing first, then fine-tuning from that head (Kumar et al., ICLR 2022)."""

    name: Literal["lp_ft"] = "lp_ft"
    probe_fraction: float = Field(
        default=0.3, gt=0, lt=1, description="share of the run's steps spent on the head alone"
    )


class DRTuneSettings(Settings):
    """DR-Tune (Zhou, Chen, Huang, ICCV 2023): the head also classifies calibrated pretrained features."""

    name: Literal["dr_tune"] = "dr_tune"
    bank_size: int = Field(default=2048, ge=0, description="K, rows of the bank; 0 is plain fine-tuning")
    bank_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="storage of the bank's rows"
    )
    bank_scope: Literal["gathered", "sharded", "private"] = Field(
        default="gathered",
        description="with several processes; gathered: rows of all, the same bank on each; sharded: rows of all, each "
        "process holds and scores its part; private: each process keeps K rows of its own",
    )
    rotation: Literal["cached", "every_step", "skip", "off"] = Field(
        default="cached",
        description="cached: refresh every rotation_period steps, apply always; every_step: T=1, as the "
        "paper writes; skip: refresh and apply on every rotation_period-th step only, as the public code "
        "does; off: no rotation",
    )
    calibration: Literal["code", "paper"] = Field(
        default="code",
        description="code: unit rows, cosine confidence, result scaled to the batch's mean feature norm; "
        "paper: raw rows, logit confidence, no rescaling (eq. 8-12)",
    )
    rotation_period: int = Field(default=10, ge=1, description="T, optimizer steps between refreshes")
    rotation_ridge: float = Field(default=1e-3, ge=0, description="rho; pulls the rotation to the identity")
    rotation_centred: bool = Field(
        default=True, description="centre both banks before the fit (public code); paper: False"
    )
    rotation_det_fix: bool = Field(default=False, description="force determinant +1, as the public code does")
    rotation_solver: Literal["auto", "newton", "polar", "svd"] = Field(
        default="auto",
        description="polar: matrix products only; newton: CPU only; svd: exact; auto: the op chooses",
    )
    translation: bool = Field(default=True, description="move each class mean onto the tuned class mean")
    cga_scale: float = Field(
        default=1.0,
        ge=0,
        description="sharpness of the confidence weights; 1 = public code, 0 = plain class mean",
    )
    loss_form: Literal["mean", "paper"] = Field(
        default="mean", description="mean: over B + n rows (public code); paper: L_CE + (n/B) R_DR, eq. 14"
    )
    head_init_std: float = Field(
        default=0.01, gt=0, description="standard deviation of the fresh head's weights"
    )

    @model_validator(mode="after")
    def _polar_needs_a_ridge(self) -> DRTuneSettings:
        without_svd = self.rotation_solver in ("newton", "polar")
        if without_svd and (self.rotation_ridge == 0 or self.rotation_det_fix):
            raise ValueError(
                f"rotation_solver={self.rotation_solver} needs rotation_ridge > 0 and rotation_det_fix=false; "
                "take rotation_solver=svd"
            )
        return self


SingleMethod = Annotated[
    FineTuneSettings
    | LinearProbeSettings
    | LPFTSettings
    | DRTuneSettings
    | L2SPSettings
    | FeatureMapSettings
    | DELTASettings
    | BSSSettings
    | StochNormSettings
    | LwFSettings
    | FeatureDistillationSettings
    | CoTuningSettings
    | BiTuningSettings
    | CoreTuningSettings
    | TeSSettings
    | SoftFineTuningSettings
    | ConceptTuningSettings
    | DAFTSettings,
    Field(discriminator="name"),
]


class CombinedSettings(Settings):
    """Several methods at once, ``method = ["daft", "dr_tune"]``; which combine: ``mooring.methods.combined``."""

    name: Literal["combined"] = "combined"
    parts: tuple[SingleMethod, ...] = Field(min_length=2, strict=False)

    @model_validator(mode="after")
    def _each_once(self) -> CombinedSettings:
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names):
            raise ValueError(f"each method once; got {', '.join(names)}")
        return self


MethodSettings = Annotated[SingleMethod | CombinedSettings, Field(discriminator="name")]


def method_tables() -> dict[str, type[Settings]]:
    """Settings class of each single method, by the method's name."""
    return {str(table.model_fields["name"].default): table for table in get_args(get_args(SingleMethod)[0])}


def method_names(value: object) -> tuple[str, ...]:
    """The methods that ``method.name`` names: "dr_tune", "daft+dr_tune" or ["daft", "dr_tune"]."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split("+")) if "+" in value else (value,)
    return tuple(str(part) for part in value) if isinstance(value, list | tuple) else ("",)


def method_title(settings: Settings) -> str:
    """The method's name as a user writes it: "dr_tune", "dr_tune+tes"."""
    parts = settings.parts if isinstance(settings, CombinedSettings) else (settings,)
    return "+".join(str(getattr(part, "name", "")) for part in parts)
