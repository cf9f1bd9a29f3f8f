"""One batch's way through the networks, shared by every method that runs on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mooring.data.batch import Batch
from mooring.models.last_map import last_map
from mooring.models.stage_outputs import recorded_outputs

if TYPE_CHECKING:
    from mooring.methods.base import Method


class Forward:
    """Features and logits of one batch; each is computed once, when it is first asked for.

    Attributes:
        batch: what goes in.
        features: [B, D] of the trained encoder, with graph, in the dtype of the run.
        logits: [B, C] of the head, with graph.
        feature_map: [B, D, H', W'] before pooling, from the same forward as ``features``.
        frozen_features: [B, D] fp32 of the untrained encoder, without graph.
        targets: soft targets [B, C] where images were mixed, else labels [B].
        valid: [B] bool, rows that are no padding.
        source_features: [S, D] of the batch's source images, where they went through the encoder with the others.
        cross_entropy: mean loss of the batch rows, where a term of the loss has computed it on its way.
    """

    def __init__(
        self, method: Method, batch: Batch, *, wants_map: bool = False, with_source: bool = False
    ) -> None:
        self.method = method
        self.batch = batch
        self.cross_entropy: Tensor | None = None
        self._wants_map = wants_map
        self._rows = batch.images.shape[0]
        self._source = batch.source if with_source else None

    @cached_property
    def features(self) -> Tensor:
        return self._encoded[0][: self._rows] if self._source is not None else self._encoded[0]

    @cached_property
    def source_features(self) -> Tensor | None:
        return None if self._source is None else self._encoded[0][self._rows :]

    @cached_property
    def feature_map(self) -> Tensor:
        features_map = self._encoded[1]
        assert features_map is not None, "ask for the map in the constructor: one forward serves all methods"
        return features_map[: self._rows] if self._source is not None else features_map

    @cached_property
    def _encoded(self) -> tuple[Tensor, Tensor | None]:
        encoder, images = self.method.encoder, self.batch.images
        if self._source is not None:
            images = torch.cat([images, self._source.images])
        with recorded_outputs(encoder, self.method.recorded_modules()) as self._recorded:
            if not self._wants_map:
                return encoder(images), None
            return features_and_map(encoder, images)

    def recorded(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Outputs of the named modules of the encoder, from the same forward as ``features``.

        Args:
            names: modules inside the encoder that the method named as ``recorded_modules``.
        """
        self.features  # noqa: B018  the forward, if it has not run
        if self._source is None:
            return {name: self._recorded[name] for name in names}
        return {name: self._recorded[name][: self._rows] for name in names}

    @cached_property
    def logits(self) -> Tensor:
        return self.method.head(self.features)

    @cached_property
    def frozen_features(self) -> Tensor:
        with torch.inference_mode():
            features = self.method.frozen_encoder(self.batch.images)
        return features.float().clone()  # the clone is an ordinary tensor, usable in ops with autograd

    @cached_property
    def targets(self) -> Tensor:
        return self.batch.labels if self.batch.targets is None else self.batch.targets

    @cached_property
    def valid(self) -> Tensor:
        return self.batch.labels >= 0

    @cached_property
    def mean_rows(self) -> Tensor:
        """Valid rows of the batches of all ranks over the number of ranks, [] float32, at least one row in all."""
        mean = self.batch.mean_rows
        return self.valid.sum().clamp_min(1) if mean is None else mean.clamp_min(1 / self.method.ranks.world)

    def over_ranks(self, mean: Tensor) -> Tensor:
        """A mean over this rank's valid rows, weighted: its mean over ranks is the mean over the rows of all."""
        return mean if self.batch.mean_rows is None else mean * (self.valid.sum() / self.mean_rows)


def features_and_map(encoder: torch.nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features [B, D] and the map they are pooled from, [B, D', H', W'], in one forward.

    Of a token model's map: ``last_map``.

    Args:
        encoder: a timm model without classifier, or a module that holds one as ``model``.
        images: [B, 3, H, W].
    """
    model: Any = getattr(encoder, "model", encoder)
    hidden = model.forward_features(images)
    features = model.forward_head(hidden, pre_logits=True)
    return features, last_map(model, hidden, (images.shape[-2], images.shape[-1]))
