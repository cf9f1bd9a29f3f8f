"""Which modules stand for the stages of an encoder, family by family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mooring.models.stage_outputs import channel_axis, channel_count, recorded_outputs, stage_modules
from mooring.models.torchvision_shim import import_timm

timm = import_timm()

_SMALL: dict[str, tuple[dict[str, Any], list[str]]] = {
    "resnet10t": ({}, [f"layer{i}.0.conv2" for i in (1, 2, 3, 4)]),
    "test_vit": ({"img_size": 32}, ["blocks.1", "blocks.2", "blocks.3", "blocks.5"]),
    # no convolution in a stage: the stage, not the patch embedding before all of them
    "swin_tiny_patch4_window7_224": (
        {
            "img_size": 64,
            "embed_dim": 12,
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 1, 1, 1),
            "window_size": 2,
        },
        [f"layers.{i}" for i in range(4)],
    ),
    "mixer_s32_224": ({"img_size": 64}, [f"blocks.{i}" for i in (1, 3, 5, 7)]),
    # blocks of several widths: the last of each stage
    "hiera_tiny_224": (
        {"img_size": (64, 64), "embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)},
        [f"blocks.{i}" for i in range(4)],
    ),
    # a gate is not the end of a stage
    "test_byobnet": ({}, []),
    "test_nfnet": ({}, []),
}


@pytest.mark.parametrize("name", _SMALL)
def test_every_stage_has_one_module_with_as_many_channels_as_told(name: str) -> None:
    options, expected = _SMALL[name]
    torch.manual_seed(0)
    encoder = timm.create_model(name, num_classes=0, **options).eval()
    stages = stage_modules(encoder)
    assert len(stages) == 4
    if expected:
        assert stages == expected
    side = 64 if options.get("img_size") != 32 else 32
    with torch.no_grad(), recorded_outputs(encoder, stages) as outputs:
        encoder(torch.randn(2, 3, side, side))
    for stage in stages:
        output = outputs[stage]
        assert output.shape[channel_axis(encoder, stage, output.ndim)] == channel_count(encoder, stage)
        assert output.ndim == 3 or output.shape[1:].numel() > channel_count(encoder, stage), (
            "a gate, not a map"
        )
