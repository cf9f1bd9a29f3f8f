"""Cross-entropy over a batch and a bank: checks, dispatch and autograd."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from mooring_kernels.bank_cross_entropy import reference
from mooring_kernels.runtime.checks import require_floats, require_labels, require_one_device, require_width
from mooring_kernels.runtime.dispatch import Impl, choose


@overload
def bank_cross_entropy(
    features: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    label_smoothing: float = ...,
    normaliser: Tensor | float | None = ...,
    return_logits: Literal[False] = ...,
    impl: Impl = ...,
) -> Tensor: ...
@overload
def bank_cross_entropy(
    features: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    label_smoothing: float = ...,
    normaliser: Tensor | float | None = ...,
    return_logits: Literal[True],
    impl: Impl = ...,
) -> tuple[Tensor, Tensor]: ...
def bank_cross_entropy(
    features: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    label_smoothing: float = 0.0,
    normaliser: Tensor | float | None = None,
    return_logits: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``(sum_i CE(W z_i + b, y_i) + sum_k CE(W v_k + b, l_k)) / (B + n)`` over the rows whose label is a class.

    Gradients reach ``features``, ``weight`` and ``bias``; those of the bank's rows are not computed. GEMMs and
    losses run in fp32 whatever the inputs and the autocast state. The batch and the bank are never concatenated.

    Args:
        features: z, [B, D] float32 or bfloat16 (float16, float64: reference); B may be 0.
        labels: y, [B] int64; a row whose label is outside 0..C-1 is skipped (-1 is padding).
        bank: v, [K, D], detached here; K may be 0. Masked rows must be finite: they are multiplied by 0.
        bank_labels: l, [K] int64; as ``labels``.
        weight: W, [C, D].
        bias: b, [C], or None.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1], for both kinds of rows.
        normaliser: divides the sum instead of the number of valid rows; a 0-d tensor or a number > 0, no gradient.
        return_logits: also return the logits of the batch.
        impl: see ``mooring_kernels``.

    Returns:
        loss, 0-d float32 (float64 if an input is), 0 with zero gradients if no row is valid; with
        ``return_logits`` also the batch's logits [B, C], detached.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options do not fit.

    Source: arXiv 2308.12058, eq. 6, 13 and 14 divided by 1 + n / B, as in the public code.
    Cost: 2 (B + K) D C FLOP forward; backward 2 (B + K) D C for W and 2 B D C for the features.
    """
    op = "bank_cross_entropy"
    require_floats(op, "features", features, "B", "D")
    require_labels(op, "labels", labels, features.shape[0])
    width = features.shape[1]
    require_floats(op, "bank", bank, "K", width)
    require_labels(op, "bank_labels", bank_labels, bank.shape[0])
    require_floats(op, "weight", weight, "C", width)
    classes = weight.shape[0]
    require_width(op, "D", width)
    require_width(op, "C", classes)
    if bias is not None:
        require_floats(op, "bias", bias, classes)
    require_one_device(
        op, features=features, labels=labels, bank=bank, bank_labels=bank_labels, weight=weight, bias=bias
    )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1]; got {label_smoothing}")
    bank = bank.detach()
    floats = (features, bank, weight) if bias is None else (features, bank, weight, bias)
    chosen = choose(op, impl, *floats)
    if chosen == "reference":
        total, logits = reference.bank_cross_entropy(
            features, labels, bank, bank_labels, weight, bias, label_smoothing
        )
    else:
        total, logits, *_ = _forward(
            features, labels, bank, bank_labels, weight, bias, float(label_smoothing), chosen
        )
    if normaliser is None:
        rows = _valid_rows(labels, classes) + _valid_rows(bank_labels, classes)
        loss = total / rows.clamp_min(1)
    else:
        loss = total / (normaliser.detach() if isinstance(normaliser, Tensor) else normaliser)
    return (loss, logits.detach()) if return_logits else loss


def _valid_rows(labels: Tensor, classes: int) -> Tensor:
    return ((labels >= 0) & (labels < classes)).sum()


def _rows_fwd(logits: Tensor, labels: Tensor, label_smoothing: float, impl: str) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        from mooring_kernels.bank_cross_entropy import gpu

        return gpu.softmax_cross_entropy_rows_fwd(logits, labels, label_smoothing)
    from mooring_kernels.bank_cross_entropy import cpu

    return cpu.softmax_cross_entropy_rows_fwd(logits, labels, label_smoothing)


def _rows_bwd(
    logits: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, label_smoothing: float, impl: str
) -> Tensor:
    if impl == "triton":
        from mooring_kernels.bank_cross_entropy import gpu

        return gpu.softmax_cross_entropy_rows_bwd(logits, labels, lse, scale, label_smoothing)
    from mooring_kernels.bank_cross_entropy import cpu

    return cpu.softmax_cross_entropy_rows_bwd(logits, labels, lse, scale, label_smoothing)


@torch.library.custom_op("mooring::bank_cross_entropy", mutates_args=())
def _forward(
    features: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Summed loss, then what the backward needs: logits and log-sum-exps of the batch and of the bank."""
    with torch.autocast(features.device.type, enabled=False):
        head = weight.float()
        offset = None if bias is None else bias.float()
        logits = torch.nn.functional.linear(features.float(), head, offset)
        bank_logits = torch.nn.functional.linear(bank.float(), head, offset)
        loss_rows, lse = _rows_fwd(logits, labels, label_smoothing, impl)
        bank_loss_rows, bank_lse = _rows_fwd(bank_logits, bank_labels, label_smoothing, impl)
        return loss_rows.sum() + bank_loss_rows.sum(), logits, bank_logits, lse, bank_lse


@_forward.register_fake
def _(
    features: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(*shape: int) -> Tensor:
        return features.new_empty(shape, dtype=torch.float32)

    batch, rows, classes = features.shape[0], bank.shape[0], weight.shape[0]
    return empty(), empty(batch, classes), empty(rows, classes), empty(batch), empty(rows)


@torch.library.custom_op("mooring::bank_cross_entropy_backward", mutates_args=())
def _backward(
    features: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    logits: Tensor,
    bank_logits: Tensor,
    lse: Tensor,
    bank_lse: Tensor,
    scale: Tensor,
    label_smoothing: float,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, weight and bias in fp32; an empty tensor for each that ``needs`` leaves out."""
    with torch.autocast(features.device.type, enabled=False):
        # three tensors: outputs of an operator must not share memory
        grad_features, grad_weight, grad_bias = (features.new_empty(0, dtype=torch.float32) for _ in needs)
        grad = _rows_bwd(logits, labels, lse, scale, label_smoothing, impl)
        if needs[0]:
            grad_features = grad @ weight.float()
        if not (needs[1] or needs[2]):
            return grad_features, grad_weight, grad_bias
        bank_grad = _rows_bwd(bank_logits, bank_labels, bank_lse, scale, label_smoothing, impl)
        if needs[1]:
            grad_weight = torch.addmm(grad.T @ features.float(), bank_grad.T, bank.float())
        if needs[2]:
            grad_bias = grad.sum(0) + bank_grad.sum(0)
        return grad_features, grad_weight, grad_bias


@_backward.register_fake
def _(
    features: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    logits: Tensor,
    bank_logits: Tensor,
    lse: Tensor,
    bank_lse: Tensor,
    scale: Tensor,
    label_smoothing: float,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (features.shape, weight.shape, weight.shape[:1])
    grads = [
        features.new_empty(shape if needed else (0,), dtype=torch.float32)
        for shape, needed in zip(shapes, needs, strict=True)
    ]
    return grads[0], grads[1], grads[2]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, labels, bank, bank_labels, weight, bias, ctx.label_smoothing, ctx.impl = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(features, labels, bank, bank_labels, weight, *output[1:])


def _autograd(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    features, weight = saved[0], saved[4]
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[4], ctx.needs_input_grad[5]]
    grads = _backward(*saved, grad_total, ctx.label_smoothing, needs, ctx.impl)
    dtypes = (features.dtype, weight.dtype, ctx.bias_dtype)
    grad_features, grad_weight, grad_bias = (
        grad.to(dtype) if needed else None for grad, dtype, needed in zip(grads, dtypes, needs, strict=True)
    )
    return grad_features, None, None, None, grad_weight, grad_bias, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
