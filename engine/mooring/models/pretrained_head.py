"""The classifier that pretrained weights came with: the source head of methods that keep the old task."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mooring.errors import WeightsError
from mooring.models.encoder import described, from_timm, weights_file
from mooring.models.torchvision_shim import import_timm
from mooring.models.weights import cached_weights, read_state_dict

timm = import_timm()


def pretrained_head(
    name: str, feature_dim: int, *, weights: str | Path = "auto", cache_dir: str | Path | None = None
) -> nn.Linear:
    """The linear classifier of a model's pretrained weights.

    Args:
        name, weights, cache_dir: as for ``build_encoder``.
        feature_dim: D that the classifier must take.

    Returns:
        Linear with weight [C_S, D] and bias [C_S] (zeros where the weights have none), float32.

    Raises:
        WeightsError: the weights hold no classifier, several, or one that does not fit the encoder's features.
    """
    _, cfg, _ = described(name)
    names = cfg.get("classifier") or "head"
    if not isinstance(names, str):
        raise WeightsError(
            f"the method needs one classifier over the encoder's features; {name} has {len(names)} "
            f"({', '.join(names)}), each over features of its own: take a model with one"
        )
    classifier = names
    file = weights_file(name, weights, cache_dir)
    if file is not None:
        state = read_state_dict(file)
    elif str(weights) == "auto":
        model = from_timm(
            name, lambda pretrained: timm.create_model(name, pretrained=pretrained), cached_weights(name)
        )
        state = model.state_dict()
    else:
        raise WeightsError(
            "the method needs the classifier of the pretrained weights; got model.weights=none"
        )
    weight, bias = (_ending(state, f"{classifier}.{part}") for part in ("weight", "bias"))
    if weight is None:
        raise WeightsError(
            f"the method needs the classifier of the pretrained weights ({classifier}.weight), and "
            f"{file or name} holds none: take weights with their classification head"
        )
    weight = weight.flatten(1) if weight.ndim == 4 else weight  # some families classify by a 1x1 convolution
    if weight.ndim != 2 or weight.shape[1] != feature_dim:
        raise WeightsError(
            f"the classifier of {file or name} must be [C, {feature_dim}]; got {list(weight.shape)}: take weights "
            "of this very architecture"
        )
    head = nn.Linear(feature_dim, weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(torch.zeros(weight.shape[0]) if bias is None else bias)
    return head


def _ending(state: dict[str, torch.Tensor], key: str) -> torch.Tensor | None:
    """The tensor of this name, whatever prefix a wrapper has put before it."""
    if key in state:
        return state[key]
    return next((value for name, value in state.items() if name.endswith("." + key)), None)
