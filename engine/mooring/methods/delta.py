"""DELTA: deep learning transfer with feature-map attention (Li et al., ICLR 2019)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.collectives import all_reduce_, gather_rows
from mooring.config.baseline_settings import DELTASettings
from mooring.data.batch import Batch
from mooring.methods.base import SetupContext
from mooring.methods.feature_map import FeatureMap
from mooring.models.stage_outputs import channel_axis, channel_count, recorded_outputs

_PROBE_EPOCHS = 10
_SHARPNESS = 5.0


class DELTA(FeatureMap):
    """Feature-map regularisation with a weight for each channel.

        L = CE + a/2 sum_j mean_i 1/(h_j w_j) c_j sum_ch A_j[ch] |FM_j[i, ch] - FM0_j[i, ch]|^2 + b/2 |phi|^2

    ``A_j = softmax(standardise(d_j) / 5)``, d_j[ch] the increase of the loss when channel ch is removed, measured
    with a classifier that was fitted to the pretrained features.

    Source: spec section 4. The public code knocks every channel out in turn (``attention="knock_out"``); the
    default takes the first-order estimate -grad . activation, one backward a batch. The public code also means
    to freeze the encoder while it fits that classifier, and does not; here it is frozen.
    """

    Config: ClassVar[type[BaseModel]] = DELTASettings
    name: ClassVar[str] = "delta"
    settings: DELTASettings

    def __init__(self, encoder: nn.Module, head: nn.Linear, settings: BaseModel, **options: Any) -> None:
        super().__init__(encoder, head, settings, **options)
        for number, channels in enumerate(self._channels()):
            self.register_buffer(f"attention_{number}", torch.full((channels,), 1.0 / channels))

    def _channels(self) -> list[int]:
        return [channel_count(self.encoder, stage) for stage in self.stages]

    def _per_channel(self, values: Tensor, number: int) -> Tensor:
        """[B, positions, ch] from the output of a stage, [B, ch, H, W], [B, H, W, ch] or [B, N, ch]."""
        return values.movedim(channel_axis(self.encoder, self.stages[number], values.ndim), -1).flatten(1, -2)

    def weighted(self, squares: Tensor, number: int) -> Tensor:
        attention: Tensor = getattr(self, f"attention_{number}")
        per_channel = self._per_channel(squares, number).mean(1)
        return attention.numel() * (per_channel * attention).sum(1)

    def setup(self, context: SetupContext) -> None:
        """Fits a classifier to the pretrained features, then weighs the channels with it."""
        batches = self._some_batches(context)
        probe = self._probe(batches, context)
        costs = [torch.zeros(c, device=context.device) for c in self._channels()]
        for batch in batches:
            found = (
                self._knocked_out(batch, probe)
                if self.settings.attention == "knock_out"
                else self._first_order(batch, probe)
            )
            for total, cost in zip(costs, found, strict=True):
                total += all_reduce_(cost / (len(batches) * self.ranks.world), self.ranks, "channel weights")
        for number, cost in enumerate(costs):
            standard = (cost - cost.mean()) / cost.std(correction=0).clamp_min(1e-12)
            getattr(self, f"attention_{number}").copy_((standard / _SHARPNESS).softmax(0))

    def _some_batches(self, context: SetupContext) -> list[Batch]:
        batches = []
        for batch in context.warm_up():
            batches.append(batch)
            if len(batches) == self.settings.attention_batches:
                break
        return batches

    def _probe(self, batches: list[Batch], context: SetupContext) -> nn.Linear:
        """A linear classifier on the frozen features of these batches, fitted for ten epochs."""
        probe = nn.Linear(self.head.in_features, self.head.out_features, device=context.device)
        nn.init.zeros_(probe.weight)
        nn.init.zeros_(probe.bias)
        # every rank fits the same classifier, to the rows of all
        features, labels = [], []
        for batch in batches:
            features.append(
                gather_rows(self.frozen_encoder(batch.images).float().clone(), self.ranks, "features")
            )
            labels.append(gather_rows(batch.labels, self.ranks, "features"))
        optimizer = torch.optim.SGD(probe.parameters(), lr=0.01, momentum=0.9)
        for _ in range(_PROBE_EPOCHS):
            for rows, targets in zip(features, labels, strict=True):
                optimizer.zero_grad()
                _loss(probe(rows), targets).backward()
                optimizer.step()
        return probe.requires_grad_(False)

    def _first_order(self, batch: Batch, probe: nn.Linear) -> list[Tensor]:
        """-sum grad . activation per channel: what the loss gains, to first order, when the channel becomes zero."""
        encoder = self.frozen_encoder.encoder
        with torch.enable_grad(), recorded_outputs(encoder, self.stages) as outputs:
            # nothing in it is trainable: a graph begins where the input asks for one
            loss = _loss(probe(encoder(batch.images.detach().requires_grad_()).float()), batch.labels)
            maps = [outputs[stage] for stage in self.stages]
            slopes = torch.autograd.grad(loss, maps)
        return [
            self._per_channel(-(slope * value.detach()), number).sum((0, 1))
            for number, (slope, value) in enumerate(zip(slopes, maps, strict=True))
        ]

    @torch.no_grad()
    def _knocked_out(self, batch: Batch, probe: nn.Linear) -> list[Tensor]:
        encoder = self.frozen_encoder.encoder
        whole = _loss(probe(encoder(batch.images).float()), batch.labels)
        costs = []
        for stage, channels in zip(self.stages, self._channels(), strict=True):
            cost = torch.zeros(channels, device=batch.images.device)
            for channel in range(channels):

                def silence(
                    module: nn.Module, inputs: Any, output: Tensor, stage: str = stage, channel: int = channel
                ) -> Tensor:
                    output = output.clone()
                    output.select(channel_axis(encoder, stage, output.ndim), channel).zero_()
                    return output

                handle = encoder.get_submodule(stage).register_forward_hook(silence)
                try:
                    cost[channel] = _loss(probe(encoder(batch.images).float()), batch.labels) - whole
                finally:
                    handle.remove()
            costs.append(cost)
        return costs


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=-1)
