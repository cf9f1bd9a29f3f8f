"""Linear probe: what the pretrained features are worth as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.collectives import all_reduce_
from mooring.config.method_settings import LinearProbeSettings
from mooring.data.batch import Batch
from mooring.methods.base import At, Method, Needs, SetupContext, StepOutput
from mooring.methods.classification import batch_cross_entropy, batch_metrics
from mooring.methods.forward import Forward


class LinearProbe(Method):
    """``L = mean_i CE(W u_i + b, y_i)`` with ``u = (f(x) - mean) / std`` of the frozen encoder f.

    The features are standardised with the mean and standard deviation of one pass over the training
    images, because a linear head on raw features is badly conditioned: the probe would be judged by
    its optimizer and not by its features. ``exported`` folds the standardisation into the head.

    Args:
        encoder, head, settings: as for every method; the encoder's parameters are frozen in place.
    """

    Config: ClassVar[type[BaseModel]] = LinearProbeSettings
    name: ClassVar[str] = "linear_probe"
    needs: ClassVar[Needs] = Needs(warm_up=True)

    def __init__(self, encoder: nn.Module, head: nn.Linear, settings: BaseModel, **options: Any) -> None:
        super().__init__(encoder, head, settings, **options)
        encoder.requires_grad_(False)
        self.register_buffer("feature_mean", torch.zeros(head.in_features))
        self.register_buffer("feature_std", torch.ones(head.in_features))
        self.feature_mean: Tensor
        self.feature_std: Tensor

    def train(self, mode: bool = True) -> LinearProbe:
        super().train(mode)
        self.encoder.eval()  # BatchNorm keeps the pretrained statistics, dropout is off
        return self

    @torch.no_grad()
    def setup(self, context: SetupContext) -> None:
        total = torch.zeros(self.head.in_features, dtype=torch.float64, device=context.device)
        square, rows = torch.zeros_like(total), torch.zeros((), dtype=torch.float64, device=context.device)
        self.encoder.eval()
        for batch in context.warm_up():
            with context.autocast():
                features = self.encoder(batch.images)
            features = features.double() * (batch.labels >= 0)[:, None]
            total += features.sum(0)
            square += features.square().sum(0)
            rows += (batch.labels >= 0).sum()
        for part in (total, square, rows):
            all_reduce_(part, self.ranks, "feature statistics")
        mean = total / rows.clamp_min(1)
        variance = (square / rows.clamp_min(1) - mean.square()).clamp_min(0)
        # a dead dimension carries nothing: scale 1 keeps it at zero instead of dividing by zero
        std = torch.where(variance > 1e-12, variance.sqrt(), torch.ones_like(variance))
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std)

    def _logits(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.encoder(images)
        return self.head((features.float() - self.feature_mean) / self.feature_std)

    def forward(self, batch: Batch, at: At) -> StepOutput:
        logits = self._logits(batch.images)
        targets = batch.labels if batch.targets is None else batch.targets
        loss = Forward(self, batch).over_ranks(batch_cross_entropy(logits, targets, self.label_smoothing))
        return StepOutput(loss, logits, batch_metrics(loss, logits, targets))

    def predict(self, images: Tensor) -> Tensor:
        return self._logits(images)

    def parameter_roles(self) -> Mapping[str, list[nn.Parameter]]:
        return {"backbone": [], "head": list(self.head.parameters()), "auxiliary": []}

    @torch.no_grad()
    def exported(self) -> tuple[nn.Module, nn.Linear]:
        folded = nn.Linear(self.head.in_features, self.head.out_features, device=self.head.weight.device)
        weight = self.head.weight.double() / self.feature_std.double()
        folded.weight.copy_(weight)
        folded.bias.copy_(self.head.bias.double() - weight @ self.feature_mean.double())
        return self.encoder, folded
