"""Attention over channels: checks and the choice between torch's own programs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mooring_kernels.channel_attention import reference
from mooring_kernels.runtime.checks import require_floats, require_width
from mooring_kernels.runtime.dispatch import Impl, choose

# The fused kernel on a GPU reads rows 16 bytes at a time: four fp32 values.
_LANES = 4
# Measured on a CPU, forward and backward, N = 196: below these the fused backward, which computes the scores
# a second time, is about a tenth slower than one that kept them (0.90 at D = 256..512, 0.94 at 768). With
# N = 49 fused is never slower, and 2.2 times as fast at D = 2048; without a gradient it never loses.
_KEPT_SCORES_CHANNELS = 768
_KEPT_SCORES_POSITIONS = 128


def channel_attention(x: Tensor, *, impl: Impl = "auto") -> Tensor:
    """``softmax_rows(rowmax(E) - E) X`` with ``E = X X^T`` for every image: unlike channels attend to each other.

    By the shift invariance of softmax this is ordinary attention over D channels with queries -X, keys and values
    X and scale 1, so torch's fused attention computes it without a [B, D, D] tensor. Gradients pass through.

    Args:
        x: X, [B, D, N] float32 or bfloat16 (float16, float64: reference), one row per channel, N >= 1
            positions. Scores and softmax are in fp32 whatever the input and the autocast state: scores of ReLU
            features reach 1e3, and their differences of 1 matter. Rows are padded to 4 positions on a GPU.
        impl: ``"native"`` and ``"triton"`` name torch's fused attention on the CPU and on a GPU; on the CPU
            small D with wide N and a gradient takes two matrix products, which are faster there.
            ``"reference"`` is the form above.

    Returns:
        [B, D, N] in the dtype of ``x``. On a GPU torch's fused backward adds in no fixed order unless
        ``torch.use_deterministic_algorithms`` is set.

    Raises:
        ValueError, TypeError: shape or dtype do not fit.

    Source: arXiv 2311.06868 and its public code, which keeps three [B, D, D] tensors.
    Cost: 4 B D^2 N FLOP forward, 10 B D^2 N backward; reads and writes 2 B D N elements forward.
    """
    op = "channel_attention"
    require_floats(op, "x", x, "B", "D", "N")
    require_width(op, "D", x.shape[1])
    require_width(op, "N", x.shape[2])
    chosen = choose(op, impl, x)
    with torch.autocast(x.device.type, enabled=False):
        if chosen == "reference" or x.shape[0] == 0:
            return reference.channel_attention(x)
        values = x.float()
        kept = values.requires_grad and torch.is_grad_enabled()
        small = x.shape[1] <= _KEPT_SCORES_CHANNELS and x.shape[2] >= _KEPT_SCORES_POSITIONS
        if chosen == "native":
            out = _by_products(values) if kept and small else _fused(values)
        else:
            out = _fused(functional.pad(values, (0, -x.shape[2] % _LANES)))[..., : x.shape[2]]
        return out.to(x.dtype)


def _fused(values: Tensor) -> Tensor:
    """Only with a dimension of heads does torch take its fused kernel; without it, it keeps the scores."""
    heads = values.unsqueeze(1)
    return functional.scaled_dot_product_attention(-heads, heads, heads, scale=1.0).squeeze(1)


def _by_products(values: Tensor) -> Tensor:
    """``softmax`` subtracts the largest of ``-E`` itself: the row maximum of E need not be found."""
    return torch.bmm(torch.softmax(-torch.bmm(values, values.transpose(1, 2)), 2), values)
