"""The demo's EfficientNet-Lite0 weights, renamed to timm's keys and put into Mooring's weight cache."""

from __future__ import annotations

from pathlib import Path

import torch

from mooring.models.torchvision_shim import import_timm
from mooring.models.weights import cached_weights, write_weights_cache

MODEL = "tf_efficientnet_lite0"


def cache_weights(checkpoint: Path) -> Path:
    """Writes the cache entry of ``tf_efficientnet_lite0`` unless it is there, and returns its path.

    The checkpoint's tensors map one to one, in order, onto timm's. Order alone would let a swapped pair
    of equal shape pass, so the kind of each tensor (the last part of its name) is compared as well.
    """
    target = cached_weights(MODEL)
    if target.is_file():
        return target
    timm = import_timm()

    ours = timm.create_model(MODEL, num_classes=1000).state_dict()
    theirs = torch.load(checkpoint, weights_only=True, map_location="cpu")
    if len(ours) != len(theirs):
        raise SystemExit(f"{checkpoint}: {len(theirs)} tensors, expected {len(ours)}")
    renamed = {}
    for (name, want), (old, tensor) in zip(ours.items(), theirs.items(), strict=True):
        if want.shape != tensor.shape or name.rsplit(".", 1)[-1] != old.rsplit(".", 1)[-1]:
            raise SystemExit(
                f"{checkpoint}: {old} {tuple(tensor.shape)} does not match {name} {tuple(want.shape)}"
            )
        renamed[name] = tensor
    return write_weights_cache(MODEL, renamed)
