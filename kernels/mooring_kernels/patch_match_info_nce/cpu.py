"""Concept-level contrast by the native module."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels import _C
from mooring_kernels.runtime.native import dtype_code, threads


def patch_match_info_nce_fwd(
    query: Tensor,
    own_key: Tensor,
    labels: Tensor,
    queue: Tensor,
    queue_valid: Tensor,
    negative_classes: Tensor,
    positive_pick: Tensor,
    temperature: float,
    negatives_per_set: int,
    epsilon: float,
    rounds: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Loss per image [B] and, if asked for, its gradient [B, P, D] (else an empty tensor), both fp32."""
    # only the queue is large: it keeps its dtype
    query, own_key = query.float().contiguous(), own_key.float().contiguous()
    queue, queue_valid = queue.contiguous(), queue_valid.contiguous()
    labels, negative_classes = labels.contiguous(), negative_classes.contiguous()
    positive_pick = positive_pick.contiguous()
    batch, patches, width = query.shape
    classes, slots = queue_valid.shape
    loss = torch.empty(batch, dtype=torch.float32)
    grad = torch.empty(query.shape if with_gradient else (0,), dtype=torch.float32)
    if batch == 0:
        return loss, grad
    _C.patch_match_info_nce(
        query.data_ptr(),
        own_key.data_ptr(),
        labels.data_ptr(),
        queue.data_ptr(),
        dtype_code(queue),
        queue_valid.data_ptr(),
        negative_classes.data_ptr(),
        positive_pick.data_ptr(),
        temperature,
        negatives_per_set,
        epsilon,
        rounds,
        loss.data_ptr(),
        grad.data_ptr(),
        batch,
        classes,
        slots,
        patches,
        width,
        negative_classes.shape[1],
        threads(),
    )
    return loss, grad
