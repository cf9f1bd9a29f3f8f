"""Concept patches: crops of the images, and their embeddings through the whole network."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mooring.models.any_size import any_image_size, token_side


def patch_side_at(image_size: int, encoder: nn.Module) -> int:
    """Side of a concept patch in pixels: 64 at 224 pixels and in proportion, a multiple of the model's tokens."""
    unit = token_side(encoder) or 16
    return max(1, round(64 / 224 * image_size / unit)) * unit


def crop_patches(images: Tensor, boxes: Tensor, side: int) -> Tensor:
    """RoIAlign on the images themselves (scale 1, aligned): one bilinear sample in the middle of each output pixel.

    Output pixel (r, c) of a box is ``images`` at ``y = y1 - 0.5 + (r + 0.5) (y2 - y1) / side``, and x likewise, with
    coordinates clamped to the pixels there are. One sample is what RoIAlign takes by default where no box is larger
    than the output, as here.

    Args:
        images: [B, 3, H, W].
        boxes: [B, P, 4] float32, x1, y1, x2, y2 in pixels inside the image, no side above ``side``.
        side: of the output.

    Returns:
        [B, P, 3, side, side] in the dtype of ``images``, without graph.
    """
    rows, patches = boxes.shape[:2]
    height, width = images.shape[-2:]
    middles = (torch.arange(side, device=boxes.device, dtype=torch.float32) + 0.5) / side
    x1, y1, x2, y2 = boxes.float().unsqueeze(-1).unbind(2)  # each [B, P, 1]
    # grid_sample counts from -1 at the left edge of the first pixel to 1 at the right edge of the last
    x = 2 * (x1 + middles * (x2 - x1)) / width - 1
    y = 2 * (y1 + middles * (y2 - y1)) / height - 1
    shape = rows, patches, side, side
    grid = torch.stack([x[:, :, None, :].expand(shape), y[:, :, :, None].expand(shape)], -1)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        tall = F.grid_sample(
            images.float(), grid.flatten(1, 2), mode="bilinear", padding_mode="border", align_corners=False
        )
    return tall.unflatten(2, (patches, side)).transpose(1, 2).to(images.dtype)


def embed_patches(
    encoder: nn.Module, layer: nn.Linear, patches: Tensor, batchnorm: Literal["joint", "per_slot"]
) -> Tensor:
    """``norm(sg[W] f + sg[b])`` of every patch: the last layer is used by value, the gradient is the encoder's.

    Args:
        encoder: maps images to pooled features.
        layer: W and b.
        patches: [B, P, 3, S, S].
        batchnorm: ``"joint"``: one forward of all B P patches. ``"per_slot"``: P forwards of B, so that BatchNorm
            sees one slot at a time. Other layers give the same for both.

    Returns:
        [B, P, d] fp32 unit rows.
    """
    rows, slots = patches.shape[:2]
    with any_image_size(encoder):
        if batchnorm == "joint":
            every = patches.flatten(0, 1).contiguous(memory_format=torch.channels_last)
            features = encoder(every).unflatten(0, (rows, slots))
        else:
            features = torch.stack([encoder(patches[:, slot]) for slot in range(slots)], 1)
    bias = None if layer.bias is None else layer.bias.detach()
    return F.normalize(F.linear(features, layer.weight.detach(), bias).float(), dim=2)
