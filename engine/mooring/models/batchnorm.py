"""BatchNorm under fine-tuning: frozen statistics, and a frozen encoder with BatchNorm folded away."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mooring.models.torchvision_shim import import_timm

timm = import_timm()

# Exact types: a subclass may standardise or mix its weight in forward, and folding would be undone.
_CONVOLUTIONS = (nn.Conv2d, timm.layers.Conv2dSame)


def _stay_in_eval(self: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(self, False)


def freeze_statistics(module: nn.Module) -> int:
    """Makes every BatchNorm inside ``module`` use and keep its running statistics, for good.

    A later ``module.train()``, at any level, leaves them in eval mode; deep copies keep that too. The
    affine weights stay trainable.

    Returns:
        The number of BatchNorm layers.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    for layer in layers:
        layer.__dict__["train"] = MethodType(_stay_in_eval, layer)
        layer.eval()
    return len(layers)


def unfreeze_statistics(module: nn.Module) -> None:
    """Undoes ``freeze_statistics``; the layers follow the mode ``module`` is in."""
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and layer.__dict__.pop("train", None) is not None:
            layer.train(module.training)


def parameter_count(module: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of parameter elements; shared parameters count once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


class FrozenEncoder(nn.Module):
    """The untrained second encoder: always in eval mode, never with a graph.

    Keep it out of the trained module (hold it in a tuple): it must not be wrapped, saved, averaged or
    given to an optimizer.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.folded = 0  # convolutions that absorbed their BatchNorm
        self.train(False)

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stays in eval mode, whatever is asked."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features [B, D] of images [B, 3, H, W], without graph."""
        return self.encoder(images)


def frozen_copy(encoder: nn.Module, *, example: Tensor | None = None, fold: bool = True) -> FrozenEncoder:
    """A frozen deep copy of ``encoder``, with BatchNorm folded into the convolution before it.

    Args:
        encoder: maps [B, 3, H, W] to [B, D]; unchanged.
        example: one image batch to trace the data flow with; None: zeros of the encoder's own
            ``data_config["input_size"]`` where it has one, else nothing is folded.
        fold: False keeps every BatchNorm as it is.
    """
    duplicate = copy.deepcopy(encoder)
    frozen = FrozenEncoder(duplicate)
    if fold and any(isinstance(layer, _BatchNorm) for layer in duplicate.modules()):
        if example is None:
            config = getattr(encoder, "data_config", None)
            parameter = next(encoder.parameters(), None)
            if config is None or parameter is None:
                return frozen
            example = torch.zeros(1, *config["input_size"], device=parameter.device, dtype=parameter.dtype)
        frozen.folded = fold_batchnorm(duplicate, example)
    return frozen


def fold_batchnorm(model: nn.Module, example: Tensor) -> int:
    """Replaces conv -> BatchNorm by one convolution with a bias, in place.

    ``w' = w g / sqrt(v + eps)``, ``b' = (b - m) g / sqrt(v + eps) + beta``, computed in float64. A pair is
    folded only where the graph of a real forward shows that the convolution's output goes to that
    BatchNorm and nowhere else, that both run once, and that the weight belongs to this convolution alone.

    Args:
        model: in eval mode; running statistics present.
        example: one batch of inputs.

    Returns:
        The number of pairs folded.
    """
    pairs = _foldable_pairs(model, example)
    for _, norm_name, conv, norm in pairs:
        _fold(conv, norm)
        parent_name, _, child = norm_name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, _what_follows(norm))
    return len(pairs)


def _foldable_pairs(model: nn.Module, example: Tensor) -> list[tuple[str, str, nn.Conv2d, _BatchNorm]]:
    names = {module: name for name, module in model.named_modules()}
    owners = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    produced: dict[nn.Module, list[Any]] = {}  # conv -> graph nodes of its outputs
    consumed: dict[nn.Module, list[Any]] = {}  # norm -> graph nodes of its inputs
    handles = []
    for module in names:
        if type(module) in _CONVOLUTIONS and not module._forward_hooks and not module._forward_pre_hooks:
            handles.append(module.register_forward_hook(_record_output(produced)))
        elif isinstance(module, _BatchNorm) and not module._forward_hooks and not module._forward_pre_hooks:
            handles.append(module.register_forward_pre_hook(_record_input(consumed)))
    wanted = {p: p.requires_grad for p in model.parameters()}
    try:
        with torch.enable_grad():
            model.requires_grad_(True)
            output = model(example)
    finally:
        for handle in handles:
            handle.remove()
        for p, requires_grad in wanted.items():
            p.requires_grad_(requires_grad)

    readers = _edges_into(output)
    # Graph nodes are kept alive by the two dicts, so their ids are unique here.
    producer = {id(nodes[0]): conv for conv, nodes in produced.items() if len(nodes) == 1}
    pairs: list[tuple[str, str, nn.Conv2d, _BatchNorm]] = []
    for norm, nodes in consumed.items():
        conv = producer.get(id(nodes[0])) if len(nodes) == 1 and nodes[0] is not None else None
        if conv is None or readers[id(nodes[0])] != 1:
            continue
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, _BatchNorm)
        plain = isinstance(conv.weight, nn.Parameter) and "weight" in conv._parameters
        if (
            plain
            and owners[id(conv.weight)] == 1
            and norm.running_mean is not None
            and norm.running_var is not None
        ):
            pairs.append((names[conv], names[norm], conv, norm))
    return pairs


def _record_output(produced: dict[nn.Module, list[Any]]) -> Any:
    def hook(module: nn.Module, _: Any, output: Tensor) -> None:
        produced.setdefault(module, []).append(output.grad_fn)

    return hook


def _record_input(consumed: dict[nn.Module, list[Any]]) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        consumed.setdefault(module, []).append(inputs[0].grad_fn)

    return hook


def _edges_into(output: Tensor | Sequence[Tensor]) -> Counter[int]:
    """How many graph nodes read each node's result."""
    outputs = [output] if isinstance(output, Tensor) else list(output)
    stack = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    edges: Counter[int] = Counter(id(node) for node in stack)
    seen = {id(node): node for node in stack}  # holds the wrappers, so that ids stay unique
    while stack:
        node = stack.pop()
        assert node is not None
        for following, _ in node.next_functions:
            if following is None:
                continue
            edges[id(following)] += 1
            if id(following) not in seen:
                seen[id(following)] = following
                stack.append(following)
    return edges


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: _BatchNorm) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double()
    bias = shift * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    dtype = conv.weight.dtype
    conv.weight.copy_((conv.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype))
    conv.bias = nn.Parameter(bias.to(dtype), requires_grad=conv.weight.requires_grad)


def _what_follows(norm: _BatchNorm) -> nn.Module:
    """What a BatchNorm does after normalising: timm's variant applies dropout and an activation."""
    rest = [module for module in norm.children() if not isinstance(module, nn.Identity)]
    if not rest:
        return nn.Identity()
    return rest[0] if len(rest) == 1 else nn.Sequential(*rest)


@contextmanager
def statistics_held(module: nn.Module) -> Iterator[None]:
    """Inside, forwards in train mode normalise by the batch as always, and running statistics stay what they are."""
    layers = [
        layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats
    ]
    for layer in layers:
        layer.track_running_stats = False  # in eval mode this changes nothing: the statistics are there
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
