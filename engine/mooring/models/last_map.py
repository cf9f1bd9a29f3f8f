"""The last feature map of a timm model, whatever its layout."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def last_map(model: Any, hidden: Tensor, image_size: tuple[int, int]) -> Tensor:
    """[B, D', H', W'] from what ``model.forward_features`` returned.

    For a token model the map is made of the patch tokens after the final norm, as a grid; other tokens (class,
    register) are left out of it.

    Args:
        model: a timm model.
        hidden: its unpooled output.
        image_size: (height, width) in pixels of the images that went in.
    """
    if hidden.ndim == 4:
        # timm's Swin and its kin keep channels last
        return hidden.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else hidden
    tokens = hidden[:, int(getattr(model, "num_prefix_tokens", 0)) :]
    rows, columns = model.patch_embed.dynamic_feat_size(image_size)
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))
