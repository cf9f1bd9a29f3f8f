"""Plain fine-tuning: encoder and a new head, cross-entropy, nothing that holds the encoder back."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel

from mooring.config.method_settings import FineTuneSettings
from mooring.data.batch import Batch
from mooring.methods.base import At, Method, StepOutput
from mooring.methods.classification import batch_cross_entropy, batch_metrics


class FineTune(Method):
    """``L = mean_i CE(W f(x_i) + b, y_i)`` over all parameters."""

    Config: ClassVar[type[BaseModel]] = FineTuneSettings
    name: ClassVar[str] = "fine_tune"

    def forward(self, batch: Batch, at: At) -> StepOutput:
        logits = self.head(self.encoder(batch.images))
        targets = self.targets(batch)
        loss = batch_cross_entropy(logits, targets, self.label_smoothing)
        return StepOutput(loss, logits, batch_metrics(loss, logits, targets))
