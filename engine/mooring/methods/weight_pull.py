"""A pull of weights towards where they were, also where ranks hold parts of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mooring.models.partition import chunks, is_divided, whole
from mooring_kernels import l2_sp


def weight_pull(
    parameters: Sequence[nn.Parameter], anchors: Sequence[Tensor | None], weight: float
) -> Tensor:
    """``mooring_kernels.l2_sp``; parameters that ZeRO-3 has divided are gathered in chunks, there and back.

    Their gradient is whole on every rank until the rest of the backward pass has added to it. Call it after a forward
    that used them: their place in the graph is made when they are whole.

    Args:
        parameters: trainable.
        anchors: whole, where each is pulled to; None: zero.
        weight: of half the squared distance.
    """
    if not any(is_divided(p) for p in parameters):
        return l2_sp(parameters, anchors, weight)
    return _DividedPull.apply(list(anchors), weight, *parameters)


class _DividedPull(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: list[Tensor | None], weight: float, *parameters: nn.Parameter) -> Tensor:
        ctx.anchors, ctx.weight, ctx.parameters = anchors, weight, parameters
        place = {id(p): i for i, p in enumerate(parameters)}
        total = torch.zeros((), device=parameters[0].device)
        for chunk in chunks(parameters):
            with whole(chunk):
                total += l2_sp([p.detach() for p in chunk], [anchors[place[id(p)]] for p in chunk], weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        place = {id(p): i for i, p in enumerate(ctx.parameters)}
        gradients: list[Tensor | None] = [None] * len(ctx.parameters)
        for chunk in chunks(ctx.parameters):
            with whole(chunk):
                for p in chunk:
                    anchor = ctx.anchors[place[id(p)]]
                    apart = p.detach() if anchor is None else p.detach() - anchor
                    gradients[place[id(p)]] = grad * ctx.weight * apart
        return (None, None, *gradients)
