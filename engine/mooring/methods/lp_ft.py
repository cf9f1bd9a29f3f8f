"""LP-FT: train the head on the frozen encoder first, then everything (Kumar et al., ICLR 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import BaseModel

from mooring.config.method_settings import LPFTSettings
from mooring.data.batch import Batch
from mooring.methods.base import At, Method, Needs, StepOutput
from mooring.methods.classification import batch_cross_entropy, batch_metrics
from mooring.methods.forward import Forward

# The encoder starts with an empty optimizer state when its phase begins: it gets a warm-up of its own.
_RAMP = 0.1


class LPFT(Method):
    """Head only for the first ``probe_fraction`` of the steps, then encoder and head together.

    A random head sends large, useless gradients into the encoder and distorts its features; a fitted
    head does not.
    """

    Config: ClassVar[type[BaseModel]] = LPFTSettings
    name: ClassVar[str] = "lp_ft"
    needs: ClassVar[Needs] = Needs(encoder_in_parts=True)
    settings: LPFTSettings

    def _first_tuning_step(self, at: At) -> int:
        # at least one step of each phase, also in a run of two steps
        return min(max(1, round(self.settings.probe_fraction * at.total_steps)), max(1, at.total_steps - 1))

    def before_step(self, at: At) -> None:
        probing = at.step < self._first_tuning_step(at)
        self.encoder.train(self.training and not probing)

    def forward(self, batch: Batch, at: At) -> StepOutput:
        probing = at.step < self._first_tuning_step(at)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not probing):
            features = self.encoder(batch.images)
        logits = self.head(features)
        targets = batch.labels if batch.targets is None else batch.targets
        loss = Forward(self, batch).over_ranks(batch_cross_entropy(logits, targets, self.label_smoothing))
        return StepOutput(loss, logits, batch_metrics(loss, logits, targets))

    def lr_factors(self, at: At) -> Mapping[str, float]:
        first = self._first_tuning_step(at)
        ramp = max(1.0, _RAMP * (at.total_steps - first))
        backbone = 0.0 if at.step < first else min(1.0, (at.step - first + 1) / ramp)
        return {"backbone": backbone}
