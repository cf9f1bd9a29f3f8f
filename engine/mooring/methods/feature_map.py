"""Feature-map ("behavioural") regularisation: intermediate maps stay near the pretrained ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.config.baseline_settings import FeatureMapSettings
from mooring.methods.base import At, Method, Needs
from mooring.methods.forward import Forward
from mooring.methods.weight_pull import weight_pull
from mooring.models.stage_outputs import recorded_outputs, stage_modules


class FeatureMap(Method):
    """``L = CE + a/2 sum_j mean_i |FM_j(x_i) - FM0_j(x_i)|^2 + b/2 |phi|^2``.

    FM_j is the output of the last convolution of stage j (before its BatchNorm), in a ViT that of the blocks at
    the quarters of the depth; FM0_j the same of the pretrained encoder in eval mode.

    Source: spec section 4. The public code sums over the batch, which ties its weight 0.01 to 48 images; here
    it is a mean, with the weight 48 times as large.
    """

    Config: ClassVar[type[BaseModel]] = FeatureMapSettings
    name: ClassVar[str] = "feature_map"
    needs: ClassVar[Needs] = Needs(frozen_encoder=True)
    settings: Any  # FeatureMapSettings, or DELTASettings in the subclass: they share what is read here

    def __init__(self, encoder: nn.Module, head: nn.Linear, settings: BaseModel, **options: Any) -> None:
        super().__init__(encoder, head, settings, **options)
        # With its BatchNorm: a folded convolution's output is not the one that is compared.
        self.keep_frozen_copy(fold=False)
        self.stages = stage_modules(encoder)

    def recorded_modules(self) -> Sequence[str]:
        return self.stages

    def additions(self, run: Forward, at: At) -> dict[str, Tensor]:
        tuned = run.recorded(self.stages)
        with torch.no_grad(), recorded_outputs(self.frozen_encoder.encoder, self.stages) as frozen:
            self.frozen_encoder(run.batch.images)
        run.logits  # noqa: B018  the forward comes first, see weight_pull; and under the run's precision
        with torch.autocast(run.features.device.type, enabled=False):
            distance = run.over_ranks(self.distance(tuned, frozen, run.valid))
            head = list(self.head.parameters())
            pull = weight_pull(head, [None] * len(head), self.settings.head_pull)
        return {self.name: 0.5 * self.settings.map_pull * distance + pull}

    def distance(self, tuned: Mapping[str, Tensor], frozen: Mapping[str, Tensor], valid: Tensor) -> Tensor:
        """Sum over stages of the mean over valid images of the squared distance."""
        total = torch.zeros((), device=valid.device)
        for number, stage in enumerate(self.stages):
            apart = (tuned[stage].float() - frozen[stage].float()).square()
            total = total + (self.weighted(apart, number) * valid).sum()
        return total / valid.sum().clamp_min(1)

    def weighted(self, squares: Tensor, number: int) -> Tensor:
        """One number per image from the squared differences of one stage, [B, C, H, W] or [B, N, C]."""
        return squares.flatten(1).sum(1)
