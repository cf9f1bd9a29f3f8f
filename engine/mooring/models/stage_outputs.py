"""The modules whose outputs stand for the stages of an encoder, for methods that compare feature maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_STAGES = 4
# Shortcuts and gates (squeeze-excitation and its kin) are not on the main path.
_ASIDE = frozenset({"downsample", "shortcut", "se", "se_module", "attn", "attn_last"})


def stage_modules(encoder: nn.Module) -> list[str]:
    """Names, inside ``encoder``, of the module that ends each of its last four stages.

    In a convolutional model that is the last convolution of the stage (before its BatchNorm), in a token model the
    block at each quarter of the depth, in a model of stages without convolutions (Swin) the stage itself.

    Raises:
        ValueError: the encoder shows neither stages nor blocks.
    """
    model: Any = getattr(encoder, "model", encoder)
    prefix = "model." if model is not encoder else ""
    blocks = getattr(model, "blocks", None)
    listed = getattr(model, "feature_info", None) or []
    # timm lists every block where all are alike, else (Hiera) the last of each stage
    alike = len({info.get("num_chs") for info in listed}) <= 1
    tokens = hasattr(model, "patch_embed") or (
        bool(listed) and all(info["module"].startswith("blocks.") for info in listed)
    )
    if tokens and alike and isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks):
        depth = len(blocks)
        ends = sorted({max(0, round(depth * (quarter + 1) / _STAGES) - 1) for quarter in range(_STAGES)})
        return [f"{prefix}blocks.{index}" for index in ends]
    stages = [info["module"] for info in listed][-_STAGES:]
    names = []
    for stage in stages:
        module = _end_of_stage(model, stage)
        if module is not None and module not in names:
            names.append(module)
    if not names:
        raise ValueError(
            f"{type(model).__name__} names no stages (feature_info) and no blocks: no maps to compare"
        )
    return [prefix + name for name in names]


def _end_of_stage(model: nn.Module, stage: str) -> str | None:
    """The last convolution on the main path at or before the end of a stage; of one without any, the stage."""
    module = model.get_submodule(stage)
    inside = [stage] if isinstance(module, nn.Conv2d) else []
    inside += [
        f"{stage}.{name}"
        for name, child in module.named_modules()
        if isinstance(child, nn.Conv2d) and name and not _ASIDE & set(name.split("."))
    ]
    if inside:
        return inside[-1]
    if any(isinstance(child, nn.Linear) for child in module.modules()):
        return stage  # attention or an MLP over tokens: a convolution before it says nothing of this stage
    # timm may name the BatchNorm or activation that ends a stage: the convolution is the one before it
    before = None
    for name, child in model.named_modules():
        if name == stage:
            return before
        if isinstance(child, nn.Conv2d):
            before = name
    return None


def channel_axis(encoder: nn.Module, name: str, ndim: int) -> int:
    """Where the channels stand in the output of a module that ``stage_modules`` names.

    Args:
        encoder: the encoder.
        name: the module.
        ndim: dimensions of its output.
    """
    model: Any = getattr(encoder, "model", encoder)
    # timm's Swin and its kin keep channels last
    last = ndim != 4 or getattr(model, "output_fmt", "NCHW") == "NHWC"
    return -1 if last and not isinstance(encoder.get_submodule(name), nn.Conv2d) else 1


def channel_count(encoder: nn.Module, name: str) -> int:
    """Channels of the output of a module that ``stage_modules`` names.

    Raises:
        ValueError: the encoder does not say.
    """
    module = encoder.get_submodule(name)
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    model: Any = getattr(encoder, "model", encoder)
    own = name.removeprefix("model.") if model is not encoder else name
    listed = {info["module"]: int(info["num_chs"]) for info in getattr(model, "feature_info", None) or []}
    width = listed.get(own)
    if width is None and len(set(listed.values())) <= 1:
        # blocks of one width, each of them or none listed
        width = next(iter(listed.values()), getattr(model, "embed_dim", None))
    if not isinstance(width, int):
        raise ValueError(f"{type(model).__name__} does not say how many channels {own} has")
    return width


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
