"""Concept-level contrast by matched patches: checks, dispatch and autograd."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mooring_kernels.patch_match_info_nce import reference
from mooring_kernels.runtime.checks import require_floats, require_labels, require_one_device, require_width
from mooring_kernels.runtime.dispatch import Impl, choose
from mooring_kernels.runtime.once import require_first_derivative

MOST_PATCHES = 16  # the kernels name an entry of a plan by one byte


def patch_match_info_nce(
    query: Tensor,
    own_key: Tensor,
    labels: Tensor,
    queue: Tensor,
    queue_valid: Tensor,
    negative_classes: Tensor,
    positive_pick: Tensor,
    temperature: float,
    *,
    negatives_per_set: int = 10,
    epsilon: float = 0.01,
    rounds: int = 30,
    reduction: Literal["mean", "none"] = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """``mean_i [LSE_j l_ij - mean_{j in pos(i)} l_ij - log |pos(i)|]`` over logits of matched patches.

    A key set is P patches of one image. Against each, the patches of image i are matched by entropic transport
    of cost ``1 - q_a . k_b`` with uniform marginals (``rounds`` Sinkhorn rounds from zero potentials), and the
    largest entries of the plan (see ``reference.rank_codes``: logarithms that round to the same multiple of 1/32
    are equal) say which pairs count; a pair's logit is ``q_a . k_b / temperature``. Positive
    key sets are the own key and the valid ones of class y_i, with one pair each; negative ones are the valid
    ones of the listed classes, with ``negatives_per_set`` pairs each. Equal entries rank by flat index aP + b.
    The gradient reaches ``query`` alone, through the logits: the plan carries none.

    Args:
        query: q, [B, P, D] float32 or bfloat16 (float16, float64: reference), rows of unit length; B may be 0.
        own_key: [B, P, D], another view of the same images, unit rows, detached here.
        labels: y, [B] int64; a row whose label is outside 0..C-1 is skipped.
        queue: [C, K, P, D] unit rows, detached here; K may be 0. An empty slot may hold anything.
        queue_valid: [C, K] bool; False marks an empty slot.
        negative_classes: [B, M] int64; an entry outside 0..C-1 (-1) or equal to y is passed over, a repeated one
            counts once. M may be 0.
        positive_pick: [B, 1 + K] int64 in 0..2, clamped to it: which of the largest three entries of the plan is
            the pair of the own key (first column) and of slot k of class y. Draw it from a generator of its own.
        temperature: > 0.
        negatives_per_set: >= 1; P * P where that is less.
        epsilon: entropy of the transport, > 0.
        rounds: >= 1, the same for every problem: no result depends on what else is in the call.
        reduction: mean: over the valid rows; none: each row's own.
        impl: see ``mooring_kernels``; the kernels take P <= 16.

    Returns:
        loss, 0-d float32 (float64 if an input is), the mean over the valid rows; 0 with a zero gradient if none is.
        With ``reduction="none"`` [B], 0 for a skipped row.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options do not fit.

    Source: Concept-Tuning (arXiv 2311.06868), concept level. Differs from the public code: it stops the rounds
        when the mean change over all problems of a call is small, so that a plan depends on its neighbours.
    Cost: with N = B (1 + K + K M) key sets, 2 N P^2 D FLOP for the cosines, 4 N P^2 rounds for the plans,
        2 D pairs for the gradient, formed in the forward pass; the backward pass is a scaling.
    """
    op = "patch_match_info_nce"
    require_floats(op, "query", query, "B", "P", "D")
    batch, patches, width = query.shape
    require_floats(op, "own_key", own_key, batch, patches, width)
    require_labels(op, "labels", labels, batch)
    require_floats(op, "queue", queue, "C", "K", patches, width)
    classes, slots = queue.shape[:2]
    for name, size in (("P", patches), ("D", width), ("C", classes)):
        require_width(op, name, size)
    _require(op, "queue_valid", queue_valid, torch.bool, (classes, slots))
    _require(op, "negative_classes", negative_classes, torch.int64, (batch, None))
    _require(op, "positive_pick", positive_pick, torch.int64, (batch, 1 + slots))
    for name, value in (("temperature", temperature), ("epsilon", epsilon)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{op}: {name} must be finite and > 0; got {value}")
    for name, value in (("negatives_per_set", negatives_per_set), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{op}: {name} must be at least 1; got {value}")
    require_one_device(
        op,
        query=query,
        own_key=own_key,
        labels=labels,
        queue=queue,
        queue_valid=queue_valid,
        negative_classes=negative_classes,
        positive_pick=positive_pick,
    )
    chosen = choose(op, impl, query, own_key, queue)
    if chosen != "reference" and patches > MOST_PATCHES:
        if impl != "auto":
            raise ValueError(
                f"{op}: impl={impl!r} takes P <= {MOST_PATCHES}; got {patches}: use impl='auto' or 'reference'"
            )
        chosen = "reference"
    options = (float(temperature), min(negatives_per_set, patches * patches), float(epsilon), rounds)
    keys = (own_key.detach(), labels, queue.detach(), queue_valid, negative_classes, positive_pick)
    if chosen == "reference":
        loss_rows = reference.patch_match_info_nce(query, *keys, *options)
    else:
        wanted = torch.is_grad_enabled() and query.requires_grad
        loss_rows, _ = _forward(query, *keys, *options, wanted, chosen)
    return loss_rows if reduction == "none" else loss_rows.sum() / _valid_rows(labels, classes)


def _require(op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    fits = isinstance(tensor, Tensor) and tensor.dtype == dtype and tensor.dim() == len(shape)
    if not fits or any(size not in (None, got) for size, got in zip(shape, tensor.shape, strict=True)):
        expected = ", ".join("M" if size is None else str(size) for size in shape)
        got = f"{list(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise (TypeError if not isinstance(tensor, Tensor) or tensor.dtype != dtype else ValueError)(
            f"{op}: {name} must be [{expected}] {dtype}; got {got}".replace("torch.", "")
        )


def _valid_rows(labels: Tensor, classes: int) -> Tensor:
    return ((labels >= 0) & (labels < classes)).sum().clamp_min(1)


@torch.library.custom_op("mooring::patch_match_info_nce", mutates_args=())
def _forward(
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
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Loss of each row [B], and its gradient [B, P, D], in fp32 (an empty tensor if it is not asked for)."""
    if impl == "triton":
        from mooring_kernels.patch_match_info_nce import gpu as module
    else:
        from mooring_kernels.patch_match_info_nce import cpu as module  # type: ignore[no-redef]

    with torch.autocast(query.device.type, enabled=False):
        return module.patch_match_info_nce_fwd(
            query,
            own_key,
            labels,
            queue,
            queue_valid,
            negative_classes,
            positive_pick,
            temperature,
            negatives_per_set,
            epsilon,
            rounds,
            with_gradient,
        )


@_forward.register_fake
def _(
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
    impl: str,
) -> tuple[Tensor, Tensor]:
    shape = query.shape if with_gradient else (0,)
    return query.new_empty(query.shape[:1], dtype=torch.float32), query.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # nobody fills their gradients with zeros


def _autograd(ctx: Any, grad_rows: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    require_first_derivative("patch_match_info_nce")
    (grad,) = ctx.saved_tensors
    return (grad_rows[:, None, None] * grad).to(ctx.dtype), *[None] * 12


_forward.register_autograd(_autograd, setup_context=_setup_context)
