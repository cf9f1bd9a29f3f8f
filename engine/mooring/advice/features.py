"""Frozen features of the user's images, and what one forward costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mooring.config.schema import RunConfig
from mooring.data.augment import ModelInput, evaluation
from mooring.data.manifest import Manifest
from mooring.data.sources import make_source
from mooring.models.encoder import build_encoder
from mooring.train.local_backend import LocalBackend
from mooring.train.precision import choose_device, choose_precision

_BATCH = 64


@dataclass(frozen=True, slots=True)
class Features:
    """Features of one model.

    Attributes:
        train, val: ([n, D] float32, [n] int64) on the CPU.
        seconds_per_image: of the fastest batch, so that no start-up is counted; decoding included.
    """

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    seconds_per_image: float


@torch.no_grad()
def frozen_features(
    config: RunConfig, manifest: Manifest, progress: Callable[[int, int], None] = lambda done, total: None
) -> Features:
    """Features of the train and validation rows, prepared as validation images are; test is left alone.

    Args:
        config: model, resolution, precision, device and source of the images.
        manifest: with as many train rows as are wanted.
        progress: called with (done, total) images.

    Raises:
        MooringError: the model or its weights cannot be used.
    """
    device = choose_device(config.train.device)
    backend = LocalBackend(device, choose_precision(config.train.precision, device))
    encoder = build_encoder(
        config.model.name, weights=config.model.weights, image_size=config.train.image_size
    )
    encoder = encoder.to(device).eval()
    size = config.train.eval_size or int(encoder.data_config["input_size"][-1])
    prepared = evaluation(ModelInput.from_model_config(encoder.data_config, size=size))
    total = sum(manifest.counts[name] for name in ("train", "val"))
    done, fastest = 0, math.inf
    found = []
    for name in ("train", "val"):
        rows, labels = [], []
        source = make_source(
            config.data.source,
            manifest.split(name),
            prepared,
            batch_size=min(_BATCH, manifest.counts[name]),
            training=False,
            workers=config.data.workers,
            device=device,
        )
        started = time.perf_counter()
        try:
            for batch in source:
                moved = batch.to(device)
                with backend.autocast():
                    features = encoder(moved.images)
                real = moved.labels >= 0
                rows.append(features.float()[real].cpu())
                labels.append(moved.labels[real].cpu())
                done += len(labels[-1])
                # the copy to the CPU has waited for the device
                now = time.perf_counter()
                fastest, started = min(fastest, (now - started) / len(moved.labels)), now
                progress(done, total)
        finally:
            source.close()
        found.append((torch.cat(rows), torch.cat(labels)))
    return Features(found[0], found[1], fastest)
