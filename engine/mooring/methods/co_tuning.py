"""Co-Tuning (You, Kou, Long, Wang, NeurIPS 2020)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.collectives import all_reduce_
from mooring.config.baseline_settings import CoTuningSettings
from mooring.methods.base import At, Method, Needs, SetupContext
from mooring.methods.classification import mean_over_valid
from mooring.methods.forward import Forward


class CoTuning(Method):
    """``L = CE(target head) + a mean_i -sum_s p(s | y_i) log softmax(source head(f(x_i)))_s``.

    ``p(s | y)`` is the mean over the training images of class y of the pretrained model's own prediction, in
    eval mode on clean images. The source head is trained along, at the backbone's rate as all that starts pretrained
    (the public code's 0.1 of the new head's), and dropped from the exported model.

    Source: spec section 4, the direct form of the public code. The paper also calibrates temperatures on source
    validation data and inverts p(y | s); that needs the source data and is not offered.
    """

    Config: ClassVar[type[BaseModel]] = CoTuningSettings
    name: ClassVar[str] = "co_tuning"
    needs: ClassVar[Needs] = Needs(source_head=True, mixing=False)
    settings: CoTuningSettings

    def __init__(self, encoder: nn.Module, head: nn.Linear, settings: BaseModel, **options: Any) -> None:
        super().__init__(encoder, head, settings, **options)
        self.source_head = self.own_source_head()
        classes, sources = head.out_features, self.source_head.out_features
        self.register_buffer("relationship", torch.full((classes, sources), 1.0 / sources))
        self.relationship: Tensor

    def pretrained_parameters(self) -> list[nn.Parameter]:
        return list(self.source_head.parameters())

    @torch.no_grad()
    def setup(self, context: SetupContext) -> None:
        """One pass over the clean training images measures p(s | y)."""
        total = torch.zeros_like(self.relationship, dtype=torch.float64)
        rows = torch.zeros(total.shape[0], dtype=torch.float64, device=total.device)
        was_training = self.training
        self.eval()
        for batch in context.clean_images():
            with context.autocast():
                features = self.encoder(batch.images)
            probability = self.source_head(features.float()).double().softmax(1)
            valid = batch.labels >= 0
            labels = batch.labels.clamp_min(0)
            total.index_add_(0, labels, probability * valid[:, None])
            rows.index_add_(0, labels, valid.double())
        self.train(was_training)
        for part in (total, rows):
            all_reduce_(part, self.ranks, "class statistics")
        mean = total / rows.clamp_min(1)[:, None]
        # a class without training images: nothing is known, so every source class is as likely
        self.relationship.copy_(torch.where(rows[:, None] > 0, mean, 1.0 / total.shape[1]))

    def additions(self, run: Forward, at: At) -> dict[str, Tensor]:
        with torch.autocast(run.features.device.type, enabled=False):
            logits = self.source_head(run.features.float())
            targets = self.relationship[run.batch.labels.clamp_min(0)]
            rows = -(targets * logits.log_softmax(1)).sum(1)
        return {"co_tuning": self.settings.co_weight * run.over_ranks(mean_over_valid(rows, run.valid))}
