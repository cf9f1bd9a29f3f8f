"""Text-supervised loss: checks, dispatch and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mooring_kernels.runtime.checks import require_floats, require_labels, require_one_device, require_width
from mooring_kernels.runtime.dispatch import Impl, choose
from mooring_kernels.runtime.eager import runs_eagerly, wants_gradient
from mooring_kernels.runtime.once import require_first_derivative
from mooring_kernels.text_supervised_loss import reference

SMALLEST_TAU = 1e-3


def text_supervised_loss(
    logits: Tensor,
    cosines: Tensor,
    labels: Tensor,
    tau: float,
    lambda_v: float,
    lambda_t: float,
    *,
    target: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``mean_i [ lse(z_i) - (1 - lv) z_i,y - lv sum_j r_ij z_ij + lt (lse(a_i) - a_i,y) ]`` with ``a = v / tau``
    and the detached reference distribution ``r = softmax(a)``, over the rows whose label is a class.

    That is the cross-entropy of softmax(z) against ``(1 - lv) onehot(y) + lv r``, plus lt times that of
    softmax(a) against the label. ``dL/dz = (softmax(z) - (1 - lv) onehot - lv r) / n`` and
    ``dL/dv = lt / (tau n) (r - onehot)``: the first term sends nothing into the cosines.

    Both softmaxes are taken relative to the largest value of the row. (A fixed shift of 1 / tau, possible as
    |v| <= 1, would underflow below tau = 0.023, where all cosines of a row are small.)

    Args:
        logits: z, [B, C] float32 or bfloat16 (float16, float64: reference).
        cosines: v, [B, C], in -1..1; keep them float32: they are divided by tau in fp32, but a bfloat16 cosine
            has already lost about 0.1 of a logit at tau = 0.03.
        labels: y, [B] int64; a row whose label is outside 0..C-1 is skipped (-1 is padding).
        tau: temperature, > 0; taken as 0.001 where smaller.
        lambda_v: weight of the reference distribution in the target, in [0, 1].
        lambda_t: weight of the text loss, >= 0; with 0 the cosines stay in the graph with gradient 0.
        target: [B, C], no gradient, rows that sum to 1 (mixup): replaces onehot(y) in both terms; ``labels`` then
            only say which rows count. Always by the reference.
        impl: see ``mooring_kernels``.

    Returns:
        loss, 0-d float32 (float64 if an input is), 0 with zero gradients if no row is valid.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options do not fit.

    Source: arXiv 2304.01489 by its public code; computes softmax(a) once where that code computes it twice.
    Cost: reads 2 B C elements forward; reads 2 B C and writes 2 B C backward. Between them only two values per
        row are kept: the backward takes the exponentials again.
        Forming the gradients in the forward instead would halve the exponentials, keep 2 B C values and move
        them once more to scale them; which is faster was not measured.
    """
    op = "text_supervised_loss"
    require_floats(op, "logits", logits, "B", "C")
    batch, classes = logits.shape
    require_width(op, "C", classes)
    require_floats(op, "cosines", cosines, batch, classes)
    require_labels(op, "labels", labels, batch)
    if target is not None:
        require_floats(op, "target", target, batch, classes)
    require_one_device(op, logits=logits, cosines=cosines, labels=labels, target=target)
    if not tau > 0:
        raise ValueError(f"{op}: tau must be > 0; got {tau}")
    if not 0 <= lambda_v <= 1:
        raise ValueError(f"{op}: lambda_v must be in [0, 1]; got {lambda_v}")
    if not 0 <= lambda_t < float("inf"):
        raise ValueError(f"{op}: lambda_t must be finite and >= 0; got {lambda_t}")
    if target is not None and impl not in ("auto", "reference"):
        raise ValueError(f"{op}: target needs impl='auto' or 'reference'; got {impl!r}")
    tau = max(float(tau), SMALLEST_TAU)
    chosen = "reference" if target is not None else choose(op, impl, logits, cosines)
    if chosen == "reference":
        return reference.text_supervised_loss(logits, cosines, labels, tau, lambda_v, lambda_t, target)
    arguments = (logits, cosines, labels, tau, float(lambda_v), float(lambda_t), chosen)
    if not runs_eagerly(logits, cosines, labels):
        return _forward(*arguments)[0]
    if wants_gradient(logits, cosines):
        return TextSupervisedLossFunction.apply(*arguments)
    return _run_forward(*arguments)[0]


def _run_forward(
    logits: Tensor,
    cosines: Tensor,
    labels: Tensor,
    tau: float,
    lambda_v: float,
    lambda_t: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, then what the backward needs: 1 / (number of valid rows) and the log-sum-exps [B] of z and of a."""
    if impl == "triton":
        from mooring_kernels.text_supervised_loss import gpu

        return gpu.text_supervised_loss_fwd(logits, cosines, labels, tau, lambda_v, lambda_t)
    from mooring_kernels.text_supervised_loss import cpu

    return cpu.text_supervised_loss_fwd(logits, cosines, labels, tau, lambda_v, lambda_t)


_forward = torch.library.custom_op("mooring::text_supervised_loss", _run_forward, mutates_args=())


@_forward.register_fake
def _(
    logits: Tensor,
    cosines: Tensor,
    labels: Tensor,
    tau: float,
    lambda_v: float,
    lambda_t: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def empty(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=torch.float32)

    return empty(), empty(), empty(logits.shape[0]), empty(logits.shape[0])


def _run_backward(
    logits: Tensor,
    cosines: Tensor,
    labels: Tensor,
    inverse_count: Tensor,
    lse_logits: Tensor,
    lse_texts: Tensor,
    grad_loss: Tensor,
    tau: float,
    lambda_v: float,
    lambda_t: float,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and cosines; an empty tensor for each that ``needs`` leaves out."""
    options = (tau, lambda_v, lambda_t, needs)
    if impl == "triton":
        from mooring_kernels.text_supervised_loss import gpu

        return gpu.text_supervised_loss_bwd(
            logits, cosines, labels, lse_logits, lse_texts, grad_loss, inverse_count, *options
        )
    from mooring_kernels.text_supervised_loss import cpu

    scale = grad_loss.item() * inverse_count.item()
    return cpu.text_supervised_loss_bwd(logits, cosines, labels, lse_logits, lse_texts, scale, *options)


_backward = torch.library.custom_op("mooring::text_supervised_loss_backward", _run_backward, mutates_args=())


@_backward.register_fake
def _(
    logits: Tensor,
    cosines: Tensor,
    labels: Tensor,
    inverse_count: Tensor,
    lse_logits: Tensor,
    lse_texts: Tensor,
    grad_loss: Tensor,
    tau: float,
    lambda_v: float,
    lambda_t: float,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor]:
    grad_logits, grad_cosines = (
        x.new_empty(x.shape if needed else (0,)) for x, needed in zip((logits, cosines), needs, strict=True)
    )
    return grad_logits, grad_cosines


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, cosines, labels, *ctx.options, ctx.impl = inputs
    ctx.save_for_backward(logits, cosines, labels, *output[1:])


def _gradients(
    backward: Callable[..., tuple[Tensor, Tensor]], ctx: Any, grad_loss: Tensor
) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    grads = backward(*ctx.saved_tensors, grad_loss, *ctx.options, needs, ctx.impl)
    grad_logits, grad_cosines = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return grad_logits, grad_cosines, None, None, None, None, None


def _autograd(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _gradients(_backward, ctx, grad_loss)


_forward.register_autograd(_autograd, setup_context=_setup_context)


class TextSupervisedLossFunction(torch.autograd.Function):
    """The same functions for eager calls, see ``runtime/eager.py``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        outputs = _run_forward(*inputs)
        ctx.set_materialize_grads(False)
        _setup_context(ctx, inputs, outputs)
        return outputs[0]

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_loss: Tensor, *_: Any
    ) -> tuple[Tensor | None, ...]:
        require_first_derivative("text_supervised_loss")
        return _gradients(_run_backward, ctx, grad_loss)
