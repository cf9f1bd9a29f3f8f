"""An encoder on images of another size than it was built for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mooring.models.torchvision_shim import import_timm

timm = import_timm()


@contextmanager
def any_image_size(encoder: nn.Module) -> Iterator[None]:
    """Inside, a token model built for one size interpolates its position embedding to the size of the images.

    The class token and other prefix tokens keep theirs. Models without a fixed size are left as they are; a model
    whose tokens cannot be placed on another grid raises in its forward, as it does without this.

    Args:
        encoder: a timm model, or a module that holds one as ``model``.
    """
    model: Any = getattr(encoder, "model", encoder)
    embed: Any = getattr(model, "patch_embed", None)
    if embed is None or getattr(model, "dynamic_img_size", True) or not hasattr(embed, "strict_img_size"):
        yield
        return
    kept = embed.strict_img_size, embed.flatten, embed.output_fmt
    # what timm itself sets for a model created with dynamic_img_size=True
    embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, timm.layers.Format.NHWC
    model.dynamic_img_size = True
    try:
        yield
    finally:
        embed.strict_img_size, embed.flatten, embed.output_fmt = kept
        model.dynamic_img_size = False


def token_side(encoder: nn.Module) -> int | None:
    """Pixels along one side of a token; None for a model that is not made of tokens."""
    embed: Any = getattr(getattr(encoder, "model", encoder), "patch_embed", None)
    side = getattr(embed, "patch_size", None)
    return None if side is None else int(side[0] if isinstance(side, tuple | list) else side)
