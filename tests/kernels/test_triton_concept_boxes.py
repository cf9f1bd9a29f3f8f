"""Triton kernels of concept_boxes: nothing is written outside, partial tiles, groups summed in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from test_op_concept_boxes import draw, loop

from mooring_kernels.concept_boxes import gpu
from mooring_kernels.concept_boxes.rule import BoxRule


@pytest.mark.parametrize(
    "shape,patches,group_width,rank_stride",
    [((3, 37, 3, 5, 4), 3, 5, 9), ((1, 600, 40, 60, 3), 2, 7, 500), ((2, 1, 1, 1, 1), 1, 1, 0)],
    ids=["odd", "parts", "ones"],
)
@pytest.mark.usefixtures("guarded_empty")
def test_peaks_and_canaries(
    shape: tuple[int, int, int, int, int],
    patches: int,
    group_width: int,
    rank_stride: int,
    device: torch.device,
    guard: Any,
    generator: torch.Generator,
) -> None:
    """At 2400 positions a program holds one channel at a time; at D = 600 the scores take two blocks."""
    inputs = draw(shape, generator)
    height, width = 16 * shape[2], 16 * shape[3]
    few = min(3, shape[4] - 1)
    rule = BoxRule(patches, group_width, rank_stride, few, shape[4] - 1, height, width, 24, False)
    got = gpu.concept_boxes_fwd(*(guard(tensor.to(device)) for tensor in inputs), rule)
    expected = loop(
        *inputs,
        image_size=(height, width),
        patches=patches,
        group_width=group_width,
        rank_stride=rank_stride,
        patch_side=24,
    )
    assert got[0].tolist() == expected[0] and got[1].tolist() == expected[1]
