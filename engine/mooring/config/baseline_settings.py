"""Settings of the methods that the five are compared with; sources in the method's own file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mooring.config.settings import Settings


class L2SPSettings(Settings):
    """L2-SP (Li, Grandvalet, Davoine, ICML 2018): weights are pulled to where they started.

    Set ``optimizer.weight_decay=0``: it pulls the same weights to zero.
    """

    name: Literal["l2_sp"] = "l2_sp"
    backbone_pull: float = Field(default=0.01, ge=0, description="a, weight of |theta - theta_0|^2 / 2")
    head_pull: float = Field(default=0.01, ge=0, description="b, weight of |phi|^2 / 2 of the head")


class FeatureMapSettings(Settings):
    """Feature-map regularisation: the last convolution of each stage stays near the pretrained one's output."""

    name: Literal["feature_map"] = "feature_map"
    map_pull: float = Field(
        default=0.48, ge=0, description="a, on a mean over images; the public 0.01 is on a sum over 48 images"
    )
    head_pull: float = Field(default=0.01, ge=0, description="b, weight of |phi|^2 / 2 of the head")


class DELTASettings(Settings):
    """DELTA (Li et al., ICLR 2019): feature maps stay near the pretrained ones, channel by channel as it matters."""

    name: Literal["delta"] = "delta"
    map_pull: float = Field(
        default=0.48, ge=0, description="a, on a mean over images; the public 0.01 is on a sum over 48 images"
    )
    head_pull: float = Field(default=0.01, ge=0, description="b, weight of |phi|^2 / 2 of the head")
    attention: Literal["taylor", "knock_out"] = Field(
        default="taylor",
        description="channel weights from the loss that a channel's removal costs; taylor: to first order, one "
        "backward a batch; knock_out: one forward per channel and batch, as the public code",
    )
    attention_batches: int = Field(
        default=10, ge=1, description="batches that the channel weights are measured on"
    )


class BSSSettings(Settings):
    """Batch Spectral Shrinkage (Chen et al., NeurIPS 2019): the smallest singular values of a batch's features."""

    name: Literal["bss"] = "bss"
    shrinkage: float = Field(
        default=1e-3, ge=0, description="eta, weight of the sum of squared singular values"
    )
    singular_values: int = Field(default=1, ge=1, description="k, how many of the smallest ones")


class StochNormSettings(Settings):
    """StochNorm (Kou et al., NeurIPS 2020): each BatchNorm channel draws between batch and moving statistics."""

    name: Literal["stoch_norm"] = "stoch_norm"
    batch_probability: float = Field(
        default=0.5, ge=0, le=1, description="p, chance that a channel uses batch statistics in a step"
    )


class LwFSettings(Settings):
    """Learning without Forgetting (Li, Hoiem, ECCV 2016): the old classifier keeps its answers."""

    name: Literal["lwf"] = "lwf"
    distillation: float = Field(default=4.0, ge=0, description="a, weight of the divergence; no factor T^2")
    distillation_temperature: float = Field(default=3.0, gt=0, description="T")


class FeatureDistillationSettings(Settings):
    """FitNet-like: the pooled features stay near the pretrained ones."""

    name: Literal["feature_distillation"] = "feature_distillation"
    feature_pull: float = Field(default=1.0, ge=0, description="a, weight of mean |r(f) - f_0|^2 / 2")
    regressor: Literal["identity", "linear"] = Field(
        default="identity", description="r: none, or a learned linear map that starts at the identity"
    )


class CoTuningSettings(Settings):
    """Co-Tuning (You et al., NeurIPS 2020): the source head learns what the target classes look like to it."""

    name: Literal["co_tuning"] = "co_tuning"
    co_weight: float = Field(default=2.3, ge=0, description="a, weight of the source head's cross-entropy")
