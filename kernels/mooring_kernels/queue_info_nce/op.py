"""InfoNCE with several positives against a queue: checks, dispatch and autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mooring_kernels.queue_info_nce import reference
from mooring_kernels.runtime.checks import require_floats, require_labels, require_one_device, require_width
from mooring_kernels.runtime.dispatch import Impl, choose
from mooring_kernels.runtime.once import require_first_derivative

# The C++ kernel puts queries into vector lanes: one alone is mostly padding. Measured at D=200, N=8000, both passes:
# 0.83x of the reference with 1 query, 1.1x with 2, 2.1x with 48.
_FEWEST_QUERIES = 2


def queue_info_nce(
    query: Tensor,
    own_key: Tensor | None,
    labels: Tensor,
    queue: Tensor,
    queue_labels: Tensor,
    temperature: float,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Mean over the queries i of ``LSE_j(l_ij) - mean_{j in pos(i)} l_ij - log |pos(i)|``, ``l_ij = q_i . k_j / T``.

    The keys of a query are its own key, where given, and all filled slots of the queue; positives are its own key
    and the slots of its label. This is the Kullback-Leibler divergence of the softmax from the uniform distribution
    over the positives. Rows are used as they come: normalise them first for cosines.

    Gradients reach ``query`` and ``own_key``, each where it requires one, and never the queue. A detached query with
    an own key that carries a gradient is Bi-Tuning's second loss: keys {own, queue} scored by a fixed vector per
    class, ``queue_info_nce(class_rows[labels].detach(), h, labels, queue, queue_labels, T)``.

    Args:
        query: q, [B, D] float32 or bfloat16 (float16, float64: reference); B may be 0.
        own_key: [B, D], or None: the queue alone holds the keys.
        labels: [B] int64; a query with a negative label is masked, and so is one without any positive.
        queue: [N, D], detached here; N may be 0. Empty slots must be finite: they may be multiplied by 0.
        queue_labels: [N] int64; a negative label marks an empty slot, which is no key. Any order of labels.
        temperature: T > 0.
        impl: see ``mooring_kernels``.

    Returns:
        loss, 0-d float32 (float64 if an input is), 0 with zero gradients if every query is masked.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or the temperature do not fit.

    Source: spec 1(c) step 6, image level; the public code copies the queue once per sample.
    Cost: reads the queue once; 4 B N D FLOP with the gradient of the query, half without. The gradient is
    ``(softmax(l) K - mean of the positive keys) / T``, and its first term is accumulated beside the running
    log-sum-exp: the backward only scales. No [B, N] logits exist; the memory held does not grow with N.
    """
    op = "queue_info_nce"
    require_floats(op, "query", query, "B", "D")
    batch, width = query.shape
    require_width(op, "D", width)
    require_labels(op, "labels", labels, batch)
    require_floats(op, "queue", queue, "N", width)
    require_labels(op, "queue_labels", queue_labels, queue.shape[0])
    if own_key is not None:
        require_floats(op, "own_key", own_key, batch, width)
    require_one_device(
        op, query=query, own_key=own_key, labels=labels, queue=queue, queue_labels=queue_labels
    )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{op}: temperature must be finite and > 0; got {temperature}")
    queue = queue.detach()
    chosen = choose(op, impl, query, queue, *(() if own_key is None else (own_key,)))
    if impl == "auto" and chosen == "native" and batch < _FEWEST_QUERIES:
        chosen = "reference"
    if chosen == "reference":
        return reference.queue_info_nce(query, own_key, labels, queue, queue_labels, temperature)
    recording = torch.is_grad_enabled()
    needs = [recording and t is not None and t.requires_grad for t in (query, own_key)]
    losses, positives, *_ = _forward(
        query, own_key, labels, queue, queue_labels, float(temperature), needs, chosen
    )
    return losses.sum() / (positives > 0).sum().clamp_min(1)


@torch.library.custom_op("mooring::queue_info_nce", mutates_args=())
def _forward(
    query: Tensor,
    own_key: Tensor | None,
    labels: Tensor,
    queue: Tensor,
    queue_labels: Tensor,
    temperature: float,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per query, in fp32: loss and number of positives [B], 0 where masked; of its loss, the gradient of the query
    [B, D] and the factor [B] that turns the query into the gradient of the own key. Empty where not needed."""
    if impl == "triton":
        from mooring_kernels.queue_info_nce import gpu

        return gpu.queue_info_nce_fwd(query, own_key, labels, queue, queue_labels, temperature, needs)
    from mooring_kernels.queue_info_nce import cpu

    return cpu.queue_info_nce_fwd(query, own_key, labels, queue, queue_labels, temperature, needs)


@_forward.register_fake
def _(
    query: Tensor,
    own_key: Tensor | None,
    labels: Tensor,
    queue: Tensor,
    queue_labels: Tensor,
    temperature: float,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def empty(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    batch, width = query.shape
    return (
        empty(batch),
        empty(batch),
        empty(batch, width) if needs[0] else empty(0),
        empty(batch) if needs[1] else empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, own_key, *_ = inputs
    ctx.dtypes = query.dtype, None if own_key is None else own_key.dtype
    ctx.save_for_backward(query, *output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # nobody fills their gradients with zeros


def _autograd(ctx: Any, grad_losses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    require_first_derivative("queue_info_nce")
    query, unit_grad_query, own_factor = ctx.saved_tensors
    grad_query = grad_own = None
    if ctx.needs_input_grad[0]:
        grad_query = (unit_grad_query * grad_losses[:, None]).to(ctx.dtypes[0])
    if ctx.needs_input_grad[1]:
        factor = own_factor * grad_losses
        # a masked row may hold anything: its factor 0 must not meet a NaN
        grad_own = torch.where(factor[:, None] != 0, query * factor[:, None], 0).to(ctx.dtypes[1])
    return grad_query, grad_own, None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
