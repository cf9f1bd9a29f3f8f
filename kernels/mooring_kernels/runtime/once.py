"""Ops whose gradient is formed by a kernel, or with the loss, can be differentiated once."""

from __future__ import annotations

import torch


def require_first_derivative(op: str) -> None:
    """For a backward: that its result will not be differentiated in turn.

    It holds no graph, so a penalty on it would be a constant: missing from the second gradient, without a word.

    Raises:
        RuntimeError: the backward records a graph.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: expected to be differentiated once; got create_graph=True: use impl='reference', which can be "
            "differentiated twice"
        )
