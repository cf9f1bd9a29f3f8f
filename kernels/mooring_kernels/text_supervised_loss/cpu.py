"""Text-supervised loss by the native module."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels import _C
from mooring_kernels.runtime.native import dtype_code, threads


def text_supervised_loss_fwd(
    logits: Tensor, cosines: Tensor, labels: Tensor, tau: float, lambda_v: float, lambda_t: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and 1 / (number of valid rows), 0-d; log-sum-exp of each row of logits and of cosines / tau, [B]."""
    logits, cosines, labels = logits.contiguous(), cosines.contiguous(), labels.contiguous()
    batch, classes = logits.shape
    loss, inverse_count = torch.empty((), dtype=torch.float32), torch.empty((), dtype=torch.float32)
    lse_logits, lse_texts = torch.empty(batch, dtype=torch.float32), torch.empty(batch, dtype=torch.float32)
    _C.text_supervised_loss_forward(
        logits.data_ptr(),
        dtype_code(logits),
        cosines.data_ptr(),
        dtype_code(cosines),
        labels.data_ptr(),
        (1.0 / tau, lambda_v, lambda_t),
        loss.data_ptr(),
        inverse_count.data_ptr(),
        lse_logits.data_ptr(),
        lse_texts.data_ptr(),
        batch,
        classes,
        threads(),
    )
    return loss, inverse_count, lse_logits, lse_texts


def text_supervised_loss_bwd(
    logits: Tensor,
    cosines: Tensor,
    labels: Tensor,
    lse_logits: Tensor,
    lse_texts: Tensor,
    scale: float,
    tau: float,
    lambda_v: float,
    lambda_t: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and cosines in their dtypes; an empty tensor for each that ``needs`` leaves out."""
    logits, cosines, labels = logits.contiguous(), cosines.contiguous(), labels.contiguous()
    batch, classes = logits.shape
    grads = [
        torch.empty(x.shape if needed else (0,), dtype=x.dtype)
        for x, needed in zip((logits, cosines), needs, strict=True)
    ]
    _C.text_supervised_loss_backward(
        logits.data_ptr(),
        dtype_code(logits),
        cosines.data_ptr(),
        dtype_code(cosines),
        labels.data_ptr(),
        lse_logits.data_ptr(),
        lse_texts.data_ptr(),
        (1.0 / tau, lambda_v, lambda_t),
        scale,
        grads[0].data_ptr(),
        grads[1].data_ptr(),
        batch,
        classes,
        threads(),
    )
    return grads[0], grads[1]
