"""InfoNCE against a queue by the native module."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels import _C
from mooring_kernels.runtime.native import dtype_code, threads


def queue_info_nce_fwd(
    query: Tensor,
    own_key: Tensor | None,
    labels: Tensor,
    queue: Tensor,
    queue_labels: Tensor,
    temperature: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and number of positives of each query, gradients of the query and factors of the own key's.

    The workspace is allocated here, where torch accounts for it.
    """
    query, labels = query.detach().float().contiguous(), labels.contiguous()
    own_key = None if own_key is None else own_key.detach().float().contiguous()
    queue, queue_labels = queue.detach().contiguous(), queue_labels.contiguous()
    shape = (query.shape[0], queue.shape[0], query.shape[1])
    loss, positives = query.new_empty(shape[0]), query.new_empty(shape[0])
    grad_query = query.new_empty(query.shape if needs[0] else (0,))
    own_factor = query.new_empty(shape[:1] if needs[1] else (0,))
    if shape[0] == 0:
        return loss, positives, grad_query, own_factor
    workers = threads()
    workspace = torch.empty(_C.queue_info_nce_workspace(*shape, needs[0], workers), dtype=torch.float32)
    _C.queue_info_nce(
        (query.data_ptr(), 0 if own_key is None else own_key.data_ptr(), labels.data_ptr()),
        (queue.data_ptr(), dtype_code(queue), queue_labels.data_ptr()),
        shape,
        1.0 / temperature,
        (
            loss.data_ptr(),
            positives.data_ptr(),
            grad_query.data_ptr() if needs[0] else 0,
            own_factor.data_ptr() if needs[1] else 0,
        ),
        workspace.data_ptr(),
        workers,
    )
    return loss, positives, grad_query, own_factor
