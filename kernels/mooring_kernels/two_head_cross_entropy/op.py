"""Cross-entropy of a target head and a source head: checks, dispatch and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mooring_kernels.runtime.checks import require_floats, require_labels, require_one_device, require_width
from mooring_kernels.runtime.dispatch import Impl, choose
from mooring_kernels.runtime.eager import runs_eagerly, wants_gradient
from mooring_kernels.runtime.once import require_first_derivative
from mooring_kernels.two_head_cross_entropy import reference


def two_head_cross_entropy(
    target_logits: Tensor,
    target_labels: Tensor,
    source_logits: Tensor,
    source_labels: Tensor,
    source_weight: Tensor | float,
    *,
    label_smoothing: float = 0.0,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """``L = mean_i CE(z_i, y_i) + w mean_s CE(x_s, l_s)``, each mean over the rows whose label is a class.

    One pass over the rows of both heads forward and one backward: ``1 / B_T`` and ``w / B_S`` are factors of the
    rows' gradients. No probabilities are kept, only one value per row.

    Args:
        target_logits: z, [B, C] float32 or bfloat16 (float16, float64: reference); B may be 0.
        target_labels: y, [B] int64; a row whose label is outside 0..C-1 is skipped (-1 is padding).
        source_logits: x, [S, C_S]; S may be 0.
        source_labels: l, [S] int64; skipped outside 0..C_S-1.
        source_weight: w, a number, or a 0-d tensor on the device of the logits, detached here; a tensor lets a
            captured or compiled step follow a schedule. Finite.
        label_smoothing: share of the target spread evenly over the classes of each head, in [0, 1].
        impl: see ``mooring_kernels``.

    Returns:
        loss, target loss and source loss, each 0-d float32 (float64 if an input is) and each with a gradient; a
        head without a valid row has loss 0 and gradient 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options do not fit.

    Source: arXiv 1909.02236 in the form of spec 3(c); the released implementations run two losses.
    Cost: reads B C + S C_S elements forward; reads and writes as many backward.
    """
    op = "two_head_cross_entropy"
    require_floats(op, "target_logits", target_logits, "B", "C")
    require_labels(op, "target_labels", target_labels, target_logits.shape[0])
    require_floats(op, "source_logits", source_logits, "S", "C_S")
    require_labels(op, "source_labels", source_labels, source_logits.shape[0])
    require_width(op, "C", target_logits.shape[1])
    require_width(op, "C_S", source_logits.shape[1])
    tensor = None
    if isinstance(source_weight, Tensor):
        require_floats(op, "source_weight", source_weight)
        tensor = source_weight = source_weight.detach()
    require_one_device(
        op,
        target_logits=target_logits,
        target_labels=target_labels,
        source_logits=source_logits,
        source_labels=source_labels,
        source_weight=tensor,
    )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1]; got {label_smoothing}")
    chosen = choose(op, impl, target_logits, source_logits)
    rows = (target_logits, target_labels, source_logits, source_labels)
    if chosen == "reference":
        return reference.two_head_cross_entropy(*rows, source_weight, label_smoothing)
    number = 0.0 if isinstance(source_weight, Tensor) else float(source_weight)
    arguments = (*rows, tensor, number, float(label_smoothing), chosen)
    if not runs_eagerly(*rows):
        loss, target_loss, source_loss, *_ = _forward(*arguments)
    elif wants_gradient(target_logits, source_logits):
        loss, target_loss, source_loss = TwoHeadCrossEntropyFunction.apply(*arguments)
    else:
        loss, target_loss, source_loss, *_ = _run_forward(*arguments)
    return loss, target_loss, source_loss


def _run_forward(
    target_logits: Tensor,
    target_labels: Tensor,
    source_logits: Tensor,
    source_labels: Tensor,
    weight: Tensor | None,
    number: float,
    label_smoothing: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The three losses, then what the backward needs; w is ``weight`` where given, else ``number``."""
    rows = (target_logits, target_labels, source_logits, source_labels)
    if impl == "triton":
        from mooring_kernels.two_head_cross_entropy import gpu

        return gpu.two_head_cross_entropy_fwd(*rows, weight, number, label_smoothing)
    from mooring_kernels.two_head_cross_entropy import cpu

    value = number if weight is None else weight.item()
    return cpu.two_head_cross_entropy_fwd(*rows, value, label_smoothing)


_forward = torch.library.custom_op("mooring::two_head_cross_entropy", _run_forward, mutates_args=())


@_forward.register_fake
def _(
    target_logits: Tensor,
    target_labels: Tensor,
    source_logits: Tensor,
    source_labels: Tensor,
    weight: Tensor | None,
    number: float,
    label_smoothing: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(*shape: int) -> Tensor:
        return target_logits.new_empty(shape, dtype=torch.float32)

    rows = target_logits.shape[0] + source_logits.shape[0]
    return empty(), empty(), empty(), empty(2), empty(rows)


def _run_backward(
    target_logits: Tensor,
    target_labels: Tensor,
    source_logits: Tensor,
    source_labels: Tensor,
    weight: Tensor | None,
    inverse_counts: Tensor,
    lse: Tensor,
    grad_loss: Tensor | None,
    grad_target_loss: Tensor | None,
    grad_source_loss: Tensor | None,
    number: float,
    label_smoothing: float,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of both logits; an empty tensor for each that ``needs`` leaves out."""
    rows = (target_logits, target_labels, source_logits, source_labels)
    upstream = (grad_loss, grad_target_loss, grad_source_loss)
    if impl == "triton":
        from mooring_kernels.two_head_cross_entropy import gpu

        return gpu.two_head_cross_entropy_bwd(
            *rows, lse, upstream, inverse_counts, weight, number, label_smoothing, needs
        )
    from mooring_kernels.two_head_cross_entropy import cpu

    value = number if weight is None else weight.item()
    both, target, source = (0.0 if grad is None else grad.item() for grad in upstream)
    target_inverse, source_inverse = inverse_counts.tolist()
    scales = (both + target) * target_inverse, (both * value + source) * source_inverse
    return cpu.two_head_cross_entropy_bwd(*rows, lse, *scales, label_smoothing, needs)


_backward = torch.library.custom_op(
    "mooring::two_head_cross_entropy_backward", _run_backward, mutates_args=()
)


@_backward.register_fake
def _(
    target_logits: Tensor,
    target_labels: Tensor,
    source_logits: Tensor,
    source_labels: Tensor,
    weight: Tensor | None,
    inverse_counts: Tensor,
    lse: Tensor,
    grad_loss: Tensor | None,
    grad_target_loss: Tensor | None,
    grad_source_loss: Tensor | None,
    number: float,
    label_smoothing: float,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor]:
    grad_target, grad_source = (
        x.new_empty(x.shape if needed else (0,))
        for x, needed in zip((target_logits, source_logits), needs, strict=True)
    )
    return grad_target, grad_source


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.number, ctx.label_smoothing, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output[3:])


def _gradients(
    backward: Callable[..., tuple[Tensor, Tensor]], ctx: Any, upstream: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    grads = backward(*ctx.saved_tensors, *upstream, ctx.number, ctx.label_smoothing, needs, ctx.impl)
    grad_target, grad_source = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return grad_target, None, grad_source, None, None, None, None, None


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(_backward, ctx, grads[:3])


_forward.register_autograd(_autograd, setup_context=_setup_context)


class TwoHeadCrossEntropyFunction(torch.autograd.Function):
    """The same functions for eager calls, see ``runtime/eager.py``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        outputs = _run_forward(*inputs)
        ctx.set_materialize_grads(False)
        _setup_context(ctx, inputs, outputs)
        return outputs[:3]

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        require_first_derivative("two_head_cross_entropy")
        return _gradients(_run_backward, ctx, grads[:3])
