"""Cross-entropy over a batch and a bank: checks, dispatch and autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from mooring_kernels.bank_cross_entropy import reference
from mooring_kernels.bank_cross_entropy.head_pass import RowsGradient, chunk_rows, head_pass
from mooring_kernels.runtime.checks import require_floats, require_labels, require_one_device, require_width
from mooring_kernels.runtime.dispatch import Impl, choose
from mooring_kernels.runtime.once import require_first_derivative

# (B + K) D C below which plain torch is faster on a CPU: the way through the dispatcher costs 0.1 to 0.2 ms, as much
# as the work. Measured: native takes 1.5 times as long at 4e4, 1.2 times at 3e6 and at 7e6, the same at 1e9.
_LEAST_WORK = 2**23


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
        bank: v, [K, D], detached here; K may be 0. Masked rows of features and bank must be finite where the weight
            has a gradient: there they are multiplied by 0.
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
    Cost: 2 (B + K) D C FLOP forward; 2 (B + K) D C for the gradient of W and 2 B D C for that of the features.
    Gradients are computed with the loss, up to the upstream factor, where one is asked for: the logits of all
    rows never exist together (512 rows at a time on the CPU), and the backward only multiplies.
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
    require_smoothing(op, label_smoothing)
    bank = bank.detach()
    floats = (features, bank, weight) if bias is None else (features, bank, weight, bias)
    chosen = choose(op, impl, *floats)
    rows = features.shape[0] + bank.shape[0]
    if impl == "auto" and chosen == "native" and rows * width * classes < _LEAST_WORK:
        chosen = "reference"
    if chosen == "reference":
        total, logits = reference.bank_cross_entropy(
            features, labels, bank, bank_labels, weight, bias, label_smoothing
        )
    else:
        needs = gradients_asked(features, weight, bias)
        total, logits, *_ = _forward(
            features,
            labels,
            bank,
            bank_labels,
            weight,
            bias,
            float(label_smoothing),
            return_logits,
            needs,
            chosen,
        )
    loss = mean_over_rows(total, labels, bank_labels, classes, normaliser)
    return (loss, logits.detach()) if return_logits else loss


def require_smoothing(op: str, label_smoothing: float) -> None:
    """A share of the target.

    Raises:
        ValueError: it is not in [0, 1].
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1]; got {label_smoothing}")


def mean_over_rows(
    total: Tensor, labels: Tensor, bank_labels: Tensor, classes: int, normaliser: Tensor | float | None
) -> Tensor:
    """``total`` over the number of valid rows, or over the normaliser given."""
    if normaliser is None:
        rows = _valid_rows(labels, classes) + _valid_rows(bank_labels, classes)
        return total / rows.clamp_min(1)
    return total / (normaliser.detach() if isinstance(normaliser, Tensor) else normaliser)


def _valid_rows(labels: Tensor, classes: int) -> Tensor:
    return ((labels >= 0) & (labels < classes)).sum()


def rows_gradient_of(impl: str) -> RowsGradient:
    """The kernel of an implementation that turns logits into losses and gradients."""
    if impl == "triton":
        from mooring_kernels.bank_cross_entropy import gpu

        return gpu.softmax_cross_entropy_rows_
    from mooring_kernels.bank_cross_entropy import cpu

    return cpu.softmax_cross_entropy_rows_


def gradients_asked(*tensors: Tensor | None) -> list[bool]:
    """Which of the inputs a backward will ask for."""
    recording = torch.is_grad_enabled()
    return [recording and tensor is not None and tensor.requires_grad for tensor in tensors]


@torch.library.custom_op("mooring::bank_cross_entropy", mutates_args=())
def _forward(
    features: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    keep_logits: bool,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Summed loss, logits of the batch, gradients of features, weight and bias; see ``HeadPass``."""
    batch, rows = features.shape[0], bank.shape[0]
    step = chunk_rows(rows, weight.shape[0], bank.device)

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        yield features.float(), labels
        for begin in range(0, rows, step):
            yield bank[begin : begin + step].float(), bank_labels[begin : begin + step]

    with torch.autocast(features.device.type, enabled=False):
        return head_pass(
            chunks(),
            max(batch, step),
            batch,
            weight.float(),
            None if bias is None else bias.float(),
            label_smoothing,
            keep_logits,
            needs,
            rows_gradient_of(impl),
        )


@_forward.register_fake
def _(
    features: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    keep_logits: bool,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return fake_head_pass(features, weight, keep_logits, needs)


def fake_head_pass(
    features: Tensor, weight: Tensor, keep_logits: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes of a ``HeadPass``."""
    batch, classes = features.shape[0], weight.shape[0]

    def empty(wanted: bool, *shape: int) -> Tensor:
        return features.new_empty(shape if wanted else (0,), dtype=torch.float32)

    return (
        empty(True),
        empty(keep_logits, batch, classes),
        empty(needs[0], *features.shape),
        empty(needs[1], *weight.shape),
        empty(needs[2], classes),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, _, _, _, weight, bias, *_ = inputs
    keep_head_pass(ctx, features, weight, bias, output)


def _autograd(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    require_first_derivative("bank_cross_entropy")
    wanted = [ctx.needs_input_grad[i] for i in (0, 4, 5)]
    grad_features, grad_weight, grad_bias = scaled_gradients(
        ctx.saved_tensors, grad_total, ctx.dtypes, wanted
    )
    return grad_features, None, None, None, grad_weight, grad_bias, None, None, None, None


def keep_head_pass(
    ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, output: tuple[Tensor, ...]
) -> None:
    """Keeps of a ``HeadPass`` what the backward multiplies: its gradients."""
    ctx.dtypes = features.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(*output[2:5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # nobody fills their gradients with zeros


def scaled_gradients(
    grads: Sequence[Tensor], factor: Tensor, dtypes: Sequence[torch.dtype], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Each gradient of the sum times the upstream one, in the dtype of its input; None where not wanted."""
    return [
        (grad * factor).to(dtype) if needed else None
        for grad, dtype, needed in zip(grads, dtypes, wanted, strict=True)
    ]


_forward.register_autograd(_autograd, setup_context=_setup_context)
