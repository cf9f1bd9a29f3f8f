"""Settings of the baselines that contrast images with images: Bi-Tuning and Core-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mooring.config.settings import Settings


class BiTuningSettings(Settings):
    """Bi-Tuning (arXiv 2011.06182): images and the head's rows are contrasted with queued keys of all classes."""

    name: Literal["bi_tuning"] = "bi_tuning"
    image_contrast: float = Field(default=1.0, ge=0, description="weight of the contrast between images")
    class_contrast: float = Field(
        default=1.0, ge=0, description="weight of the contrast between the head's row of a class and images"
    )
    contrast_temperature: float = Field(default=0.07, ge=1e-3, description="T of the contrast")
    queue_rows: int = Field(default=40, ge=1, description="K, keys kept of each class")
    queue_scope: Literal["gathered", "sharded", "private"] = Field(
        default="gathered",
        description="with several processes; gathered: keys of all, the same queues on each; sharded: keys of all, "
        "each process holds and scores those of its classes; private: its own",
    )
    key_momentum: float = Field(
        default=0.999, ge=0, le=1, description="m of the key network, theta_k <- m theta_k + (1 - m) theta_q"
    )
    embed_width: int = Field(default=128, ge=1, description="width of the projection")


class CoreTuningSettings(Settings):
    """Core-tuning (NeurIPS 2021, arXiv 2102.06605): features mixed with hard ones, and a focal contrast among them."""

    name: Literal["core_tuning"] = "core_tuning"
    contrast_weight: float = Field(
        default=0.1, ge=0, description="eta, weight of the focal contrast; the public parser's default is 10"
    )
    contrast_width: int = Field(default=256, ge=1, description="output width of the contrast's MLP")
    contrast_temperature: float = Field(default=0.07, ge=1e-3, description="T of the contrast")
    mix_alpha: float = Field(
        default=1.0, gt=0, description="a, shares of mixed features are drawn from Beta(a, a)"
    )
    parity: Literal["corrected", "release"] = Field(
        default="corrected",
        description="release: the public code's masks, averages and gradients, with their errors",
    )
