"""Class means of a bank, the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels.row_normalise.reference import row_normalise
from mooring_kernels.runtime.dispatch import working_dtype

NORM_FLOOR = 1e-12


def class_statistics(
    frozen: Tensor, tuned: Tensor, labels: Tensor, head_weight: Tensor, cga_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = working_dtype(frozen, tuned, head_weight)
    frozen, tuned, head_weight = frozen.to(dtype), tuned.to(dtype), head_weight.to(dtype)
    classes = head_weight.shape[0]
    valid = (labels >= 0) & (labels < classes)
    # Selected, not multiplied by zero: an empty slot may hold anything, NaN included.
    index = torch.where(valid, labels, 0)
    frozen = torch.where(valid[:, None], frozen, 0)
    tuned = torch.where(valid[:, None], tuned, 0)

    count = head_weight.new_zeros(classes).index_add(0, index, valid.to(dtype))
    frozen_mean = torch.zeros_like(head_weight).index_add(0, index, frozen) / count.clamp_min(1)[:, None]

    prototype, _ = row_normalise(head_weight, NORM_FLOOR)
    logit = torch.where(valid, cga_scale * (tuned * prototype[index]).sum(1), -torch.inf)
    highest = head_weight.new_full((classes,), -torch.inf).scatter_reduce(0, index, logit, "amax")
    exponential = torch.where(valid, torch.exp(logit - highest[index]), 0)
    total = head_weight.new_zeros(classes).index_add(0, index, exponential)
    weight = exponential / torch.where(valid, total[index], 1)
    tuned_mean = torch.zeros_like(head_weight).index_add(0, index, weight[:, None] * tuned)
    return frozen_mean, tuned_mean, count
