"""The modules whose outputs stand for the stages of an encoder, for methods that compare feature maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_STAGES = 4


def stage_modules(encoder: nn.Module) -> list[str]:
    """Names, inside ``encoder``, of the module that ends each of its last four stages.

    In a convolutional model that is the last convolution of the stage (before its BatchNorm), in a token model the
    block at each quarter of the depth.

    Raises:
        ValueError: the encoder shows neither stages nor blocks.
    """
    model: Any = getattr(encoder, "model", encoder)
    prefix = "model." if model is not encoder else ""
    blocks = getattr(model, "blocks", None)
    if hasattr(model, "patch_embed") and isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks):
        depth = len(blocks)
        ends = sorted({max(0, round(depth * (quarter + 1) / _STAGES) - 1) for quarter in range(_STAGES)})
        return [f"{prefix}blocks.{index}" for index in ends]
    stages = [info["module"] for info in getattr(model, "feature_info", [])][-_STAGES:]
    names = []
    for stage in stages:
        convolution = _last_convolution(model, stage)
        if convolution is not None and convolution not in names:
            names.append(convolution)
    if not names:
        raise ValueError(
            f"{type(model).__name__} names no stages (feature_info) and no blocks: no maps to compare"
        )
    return [prefix + name for name in names]


def _last_convolution(model: nn.Module, stage: str) -> str | None:
    """The last convolution on the main path at or before the end of a stage; shortcuts are not on it."""
    module = model.get_submodule(stage)
    inside = [stage] if isinstance(module, nn.Conv2d) else []
    inside += [
        f"{stage}.{name}"
        for name, child in module.named_modules()
        if isinstance(child, nn.Conv2d)
        and name
        and not {"downsample", "shortcut", "se"} & set(name.split("."))
    ]
    if inside:
        return inside[-1]
    # timm may name the BatchNorm or activation that ends a stage: the convolution is the one before it
    before = None
    for name, child in model.named_modules():
        if name == stage:
            return before
        if isinstance(child, nn.Conv2d):
            before = name
    return None


@contextmanager
def recorded_outputs(encoder: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within it, each forward of ``encoder`` leaves the outputs of the named modules in the mapping."""
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            outputs[name] = output

        return keep

    handles = [encoder.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
