"""Learning without Forgetting (Li, Hoiem, ECCV 2016)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.config.baseline_settings import LwFSettings
from mooring.methods.base import At, Method, Needs
from mooring.methods.classification import tempered_divergence
from mooring.methods.forward import Forward


class LwF(Method):
    """``L = CE + a mean_i KL(softmax(s_0 / T) || softmax(s / T))``, without a factor T^2.

    s are the logits of the pretrained classifier on the tuned features, s_0 on the frozen ones; that
    classifier itself is frozen.

    Source: spec section 4. The public code stores s_0 once, under another random augmentation than the student
    sees; here both see the same view.
    """

    Config: ClassVar[type[BaseModel]] = LwFSettings
    name: ClassVar[str] = "lwf"
    needs: ClassVar[Needs] = Needs(frozen_encoder=True, source_head=True)
    settings: LwFSettings

    def __init__(self, encoder: nn.Module, head: nn.Linear, settings: BaseModel, **options: Any) -> None:
        super().__init__(encoder, head, settings, **options)
        self.keep_frozen_copy()
        self.source_head = self.own_source_head().requires_grad_(False)

    def additions(self, run: Forward, at: At) -> dict[str, Tensor]:
        with torch.autocast(run.features.device.type, enabled=False):
            divergence = tempered_divergence(
                self.source_head(run.features.float()),
                self.source_head(run.frozen_features).detach(),
                self.settings.distillation_temperature,
                run.valid,
            )
        return {"lwf": self.settings.distillation * run.over_ranks(divergence)}
