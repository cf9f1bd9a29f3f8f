"""Mixup and CutMix between a data source and a method, with a random stream of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mooring.data.batch import Batch
from mooring.train.mixing import mix


class Mixer:
    """Turns a batch into a mixed batch with soft targets; returns it as it is where both alphas are 0.

    Args:
        mixup, cutmix: alphas of the Beta distributions; 0 is off.
        num_classes: C.
        seed: of the generator; its state is part of the run's state.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int, seed: int) -> None:
        self.mixup = mixup
        self.cutmix = cutmix
        self.num_classes = num_classes
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: Batch) -> Batch:
        if self.mixup == 0 and self.cutmix == 0:
            return batch
        mixed = mix(
            batch.images, batch.labels, mixup=self.mixup, cutmix=self.cutmix, generator=self.generator
        )
        return replace(batch, images=mixed.images, targets=mixed.soft_targets(self.num_classes))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
