"""Feature distillation: the pooled features stay near the pretrained ones (after FitNets, Romero et al., ICLR 2015)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.config.baseline_settings import FeatureDistillationSettings
from mooring.methods.base import At, Method, Needs
from mooring.methods.classification import mean_over_valid
from mooring.methods.forward import Forward


class FeatureDistillation(Method):
    """``L = CE + a/2 mean_i |r(f(x_i)) - f_0(x_i)|^2``, r the identity or a learned linear map.

    Source: spec section 4 (no public code is followed).
    """

    Config: ClassVar[type[BaseModel]] = FeatureDistillationSettings
    name: ClassVar[str] = "feature_distillation"
    needs: ClassVar[Needs] = Needs(frozen_encoder=True)
    settings: FeatureDistillationSettings

    def __init__(self, encoder: nn.Module, head: nn.Linear, settings: BaseModel, **options: Any) -> None:
        super().__init__(encoder, head, settings, **options)
        self.keep_frozen_copy()
        self.regressor: nn.Module = nn.Identity()
        if self.settings.regressor == "linear":
            self.regressor = nn.Linear(head.in_features, head.in_features)
            nn.init.eye_(self.regressor.weight)
            nn.init.zeros_(self.regressor.bias)

    def additions(self, run: Forward, at: At) -> dict[str, Tensor]:
        with torch.autocast(run.features.device.type, enabled=False):
            apart = self.regressor(run.features.float()) - run.frozen_features
            rows = apart.square().sum(1)
            mean = run.over_ranks(mean_over_valid(rows, run.valid))
        return {"feature_distillation": 0.5 * self.settings.feature_pull * mean}
