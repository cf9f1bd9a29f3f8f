"""DR-Tune's loss over a batch and its calibrated bank: checks, dispatch and autograd."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from mooring_kernels.bank_cross_entropy.op import (
    fake_head_pass,
    gradients_asked,
    keep_head_pass,
    mean_over_rows,
    require_smoothing,
    scaled_gradients,
)
from mooring_kernels.class_statistics.op import require_bank, require_cga_scale
from mooring_kernels.dr_tune_loss import reference
from mooring_kernels.dr_tune_loss.block import dr_tune_block
from mooring_kernels.runtime.checks import require_floats, require_labels, require_one_device
from mooring_kernels.runtime.dispatch import Impl, choose, working_dtype
from mooring_kernels.runtime.once import require_first_derivative


@overload
def dr_tune_loss(
    features: Tensor,
    labels: Tensor,
    frozen: Tensor,
    tuned: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rotation: Tensor | None,
    scale: Tensor | float,
    *,
    cga_scale: float = ...,
    label_smoothing: float = ...,
    normaliser: Tensor | float | None = ...,
    return_logits: Literal[False] = ...,
    impl: Impl = ...,
) -> Tensor: ...
@overload
def dr_tune_loss(
    features: Tensor,
    labels: Tensor,
    frozen: Tensor,
    tuned: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rotation: Tensor | None,
    scale: Tensor | float,
    *,
    cga_scale: float = ...,
    label_smoothing: float = ...,
    normaliser: Tensor | float | None = ...,
    return_logits: Literal[True],
    impl: Impl = ...,
) -> tuple[Tensor, Tensor]: ...
def dr_tune_loss(
    features: Tensor,
    labels: Tensor,
    frozen: Tensor,
    tuned: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rotation: Tensor | None,
    scale: Tensor | float,
    *,
    cga_scale: float = 1.0,
    label_smoothing: float = 0.0,
    normaliser: Tensor | float | None = None,
    return_logits: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``(sum_i CE(W z_i + b, y_i) + sum_k CE(W v_k + b, l_k)) / (B + n)`` over the rows whose label is a class.

    ``v_k = s u(R (p_k - m_{l_k}) + mu_{l_k})``: ``class_statistics``, ``calibrate`` and ``bank_cross_entropy`` in one,
    with their options and limits, and the calibrated bank never whole in memory on the CPU. Gradients reach
    ``features``, ``weight`` and ``bias``; none passes through m, mu, s, R or v.

    K rows are never rotated against a cheaper way. A caller that keeps rotated rows R p_k, renews them all every T
    steps and only the B new ones in between, passes them as ``frozen`` with ``rotation=None``; that costs less than
    passing R unless 3 C < B + K / T. With ``rotation``, three products of C rows take the place of one of K where
    3 C < K: the head is rotated and not the bank, which needs R to be orthogonal.

    Args:
        features: z, [B, D] float32 or bfloat16 (float16, float64: reference); B may be 0.
        labels: y, [B] int64; a row whose label is outside 0..C-1 is skipped (-1 is padding).
        frozen: p, [K, D] unit rows, or R p; K may be 0.
        tuned: d, [K, D] unit rows.
        bank_labels: l, [K] int64; as ``labels``. Masked rows are not read.
        weight: W, [C, D].
        bias: b, [C], or None.
        rotation: R, [D, D] orthogonal, acts on column vectors; None is the identity.
        scale: s, a 0-d tensor on the same device, or a number.
        cga_scale: see ``class_statistics``.
        label_smoothing, normaliser, return_logits: see ``bank_cross_entropy``.
        impl: see ``mooring_kernels``.

    Returns:
        loss, 0-d float32 (float64 if an input is), 0 with zero gradients if no row is valid; with
        ``return_logits`` also the batch's logits [B, C], detached.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options do not fit.

    Source: arXiv 2308.12058, eq. 6 and 8-14, in the public code's normalised form, as in the ops above.
    Cost: 4 (B + K) D C + 2 B D C FLOP with all gradients, and 6 C D^2 (or 2 K D^2) with R; reads ``tuned`` once and
    ``frozen`` twice.
    """
    op = "dr_tune_loss"
    require_floats(op, "features", features, "B", "D")
    require_labels(op, "labels", labels, features.shape[0])
    width = features.shape[1]
    require_floats(op, "frozen", frozen, "K", width)
    require_floats(op, "weight", weight, "C", width)
    require_bank(op, frozen, tuned, bank_labels, weight)
    require_cga_scale(op, cga_scale)
    require_smoothing(op, label_smoothing)
    if bias is not None:
        require_floats(op, "bias", bias, weight.shape[0])
    if rotation is not None:
        require_floats(op, "rotation", rotation, width, width)
        rotation = rotation.detach()
    frozen, tuned = frozen.detach(), tuned.detach()
    floats = [features, frozen, tuned, weight, *(t for t in (bias, rotation) if t is not None)]
    if isinstance(scale, Tensor):
        require_floats(op, "scale", scale)
        scale = scale.detach()
    else:
        scale = torch.full((), scale, dtype=working_dtype(*floats), device=frozen.device)
    require_one_device(
        op, features=features, labels=labels, frozen=frozen, bias=bias, rotation=rotation, scale=scale
    )
    chosen = choose(op, impl, *floats)
    arguments = features, labels, frozen, tuned, bank_labels, weight, bias, rotation, scale
    if chosen == "reference":
        total, logits = reference.dr_tune_loss(*arguments, cga_scale, label_smoothing)
    else:
        needs = gradients_asked(features, weight, bias)
        total, logits, *_ = _forward(
            *arguments, float(cga_scale), float(label_smoothing), return_logits, needs, chosen
        )
    loss = mean_over_rows(total, labels, bank_labels, weight.shape[0], normaliser)
    return (loss, logits.detach()) if return_logits else loss


@torch.library.custom_op("mooring::dr_tune_loss", mutates_args=())
def _forward(
    features: Tensor,
    labels: Tensor,
    frozen: Tensor,
    tuned: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rotation: Tensor | None,
    scale: Tensor,
    cga_scale: float,
    label_smoothing: float,
    keep_logits: bool,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Summed loss, logits of the batch, gradients of features, weight and bias; see ``HeadPass``."""
    if impl == "triton":
        from mooring_kernels.dr_tune_loss.gpu import KERNELS
    else:
        from mooring_kernels.dr_tune_loss.cpu import KERNELS
    # autocast would round the residuals, which are small differences, to 8 bits
    with torch.autocast(features.device.type, enabled=False):
        return dr_tune_block(
            features,
            labels,
            frozen,
            tuned,
            bank_labels,
            weight,
            bias,
            rotation,
            scale,
            cga_scale,
            label_smoothing,
            keep_logits,
            needs,
            KERNELS,
        )


@_forward.register_fake
def _(
    features: Tensor,
    labels: Tensor,
    frozen: Tensor,
    tuned: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rotation: Tensor | None,
    scale: Tensor,
    cga_scale: float,
    label_smoothing: float,
    keep_logits: bool,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return fake_head_pass(features, weight, keep_logits, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    keep_head_pass(ctx, features=inputs[0], weight=inputs[5], bias=inputs[6], output=output)


def _autograd(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    require_first_derivative("dr_tune_loss")
    wanted = [ctx.needs_input_grad[i] for i in (0, 5, 6)]
    grad_features, grad_weight, grad_bias = scaled_gradients(
        ctx.saved_tensors, grad_total, ctx.dtypes, wanted
    )
    return (grad_features, *[None] * 4, grad_weight, grad_bias, *[None] * 7)


_forward.register_autograd(_autograd, setup_context=_setup_context)
