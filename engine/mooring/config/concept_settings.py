"""Settings of Concept-Tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mooring.config.settings import Settings


class ConceptTuningSettings(Settings):
    """Concept-Tuning (ICCV 2023, arXiv 2311.06868): contrast between patches of images, and a front-door head."""

    name: Literal["concept_tuning"] = "concept_tuning"
    image_contrast: float = Field(
        default=1.0, ge=0, description="alpha, weight of the contrast between images"
    )
    concept_contrast: float = Field(
        default=1.0, ge=0, description="beta, weight of the contrast between concept patches"
    )
    bottleneck_penalty: float = Field(
        default=0.005, ge=0, description="lambda, weight of the bottleneck's Kullback-Leibler term"
    )
    concept_start_epoch: int = Field(
        default=0,
        ge=0,
        description="first epoch with concept patches; 0 as published, 1 spares crops chosen by a random head",
    )
    contrast_warm_up: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field(
        default="auto",
        description="share of the run before both contrasts begin, their key network then being a fresh copy; 0 as "
        "published; auto: 0.2 in runs below 10,000 steps, the length of the published ones, else 0",
    )
    contrast_temperature: float = Field(
        default=0.07, ge=1e-3, description="T of the contrast with queued keys"
    )
    queue_rows: int = Field(default=40, ge=1, description="K, keys kept of each class")
    queue_scope: Literal["gathered", "sharded", "private"] = Field(
        default="gathered",
        description="with several processes; gathered: keys of all, the same queues on each; sharded: keys of all, "
        "each process holds and scores those of its classes; private: its own",
    )
    key_momentum: float = Field(
        default=0.999, ge=0, le=1, description="m of the key network, theta_k <- m theta_k + (1 - m) theta_q"
    )
    concept_source: Literal["patches", "channel_slices"] = Field(
        default="patches",
        description="patches: crops of the image where groups of channels peak, encoded again; "
        "channel_slices: equal slices of the pooled map, each with its own queue (cheap, not the published form)",
    )
    patches: int = Field(default=9, ge=1, le=16, description="P, concept patches of an image")
    patch_side: int | None = Field(
        default=None,
        ge=1,
        description="side of a patch in pixels; none: 64 at 224 pixels and in proportion, in whole tokens of the model",
    )
    patch_bn: Literal["joint", "per_slot"] = Field(
        default="joint",
        description="BatchNorm statistics of the patches: over all of them in one forward, or slot by slot "
        "in P forwards (public code)",
    )
    group_width: int | None = Field(
        default=None, ge=1, description="channels whose sum places a patch; none: 30 of 2048, in proportion"
    )
    rank_stride: int | None = Field(
        default=None,
        ge=0,
        description="ranks from one group of channels to the next; none: 250 of 2048, in proportion",
    )
    rivals: int = Field(
        default=3, ge=1, description="classes that the ranking of channels sets against the label"
    )
    negative_classes: int = Field(
        default=100,
        ge=1,
        description="M, most confused classes whose patches are negatives; at most C - 1 are there",
    )
    negatives_per_set: int = Field(
        default=10, ge=1, description="pairs of patches that count against each negative image"
    )
    transport_entropy: float = Field(
        default=0.01, gt=0, description="entropy of the transport that matches patches"
    )
    transport_rounds: int = Field(
        default=30, ge=1, description="Sinkhorn rounds, the same for every pair of images"
    )
    peak: Literal["corner", "center"] = Field(
        default="corner",
        description="a patch lies around the corner of the strongest cell and is cut at the image's border "
        "(public code), or around its middle and is shifted inside",
    )
    channel_slices: int = Field(
        default=8, ge=1, description="S with concept_source=channel_slices; must divide the feature width"
    )
    embed: Literal["auto", "logits", "proj"] = Field(
        default="auto",
        description="space of the contrast: the head's logits (public code), or a projection; "
        "auto: logits up to 400 classes",
    )
    embed_width: int = Field(default=128, ge=1, description="width of the projection with embed=proj")
    random_init_queue: bool = Field(
        default=False,
        description="queues start full of random keys, as in the public code; else empty and masked",
    )
    fusion: Literal["sum", "concat_mlp"] = Field(
        default="sum",
        description="how the two attentions join: sum, pool, linear (public code), or pool, concatenate, MLP (paper)",
    )
    bottleneck: int = Field(
        default=512, ge=1, description="d, width of the front-door head's variational bottleneck"
    )
    kl: Literal["code", "vib"] = Field(
        default="code",
        description="code: the deviation enters the penalty as exp(sigma), as published; vib: as sigma",
    )
    predict: Literal["cls", "fd", "avg", "auto"] = Field(
        default="avg",
        description="test-time logits: classifier, front-door head, mean of their log-probabilities, or the best "
        "of the three on the validation split of each epoch",
    )
