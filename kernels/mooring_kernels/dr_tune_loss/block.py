"""The DR-Tune block as one program: which side is rotated, and the passes over batch and bank.

In rows, with residuals r_k = p_k - m_{l_k} and an orthogonal R, the calibrated row is v_k = s u(R r_k + mu_{l_k}).

    head:  v_k = R v'_k with v'_k = s u(r_k + R^T mu_{l_k}), and W v_k = (W R) v'_k: two products of C rows with R take
           the place of one of K rows, and dW = (sum_k g_k v'_k^T) R^T is a third.
    bank:  the rows are rotated first, R p_k, and what follows is the block without a rotation.

Either way no calibrated bank is kept for a backward, and its rows are read where they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mooring_kernels.bank_cross_entropy.head_pass import HeadPass, RowsGradient, chunk_rows, head_pass

Statistics = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
# (frozen [n, D], labels [n], frozen_mean, tuned_mean, scale, out [>= n, D]) -> the first n rows of out
Translate = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Kernels(NamedTuple):
    """What an implementation brings; the matrix products are torch's."""

    class_statistics: Statistics
    translate_: Translate
    rows_gradient_: RowsGradient


def rotates_the_head(rows: int, classes: int) -> bool:
    """Whether three products of C rows with R cost less than one of K rows."""
    return 3 * classes < rows


def dr_tune_block(
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
    kernels: Kernels,
) -> HeadPass:
    """Losses and gradients summed over the valid rows of batch and bank."""
    batch, (rows, width), classes = features.shape[0], frozen.shape, weight.shape[0]
    head, offset = weight.float().contiguous(), None if bias is None else bias.float()
    turn = None if rotation is None else rotation.float()
    if turn is not None and not rotates_the_head(rows, classes):
        frozen, turn = frozen.float() @ turn.T, None
    frozen, labels, bank_labels = frozen.contiguous(), labels.contiguous(), bank_labels.contiguous()
    frozen_mean, tuned_mean, _ = kernels.class_statistics(frozen, tuned, bank_labels, head, cga_scale)
    step = chunk_rows(rows, classes, frozen.device)
    moved = head.new_empty(min(step, rows), width)

    def batch_rows() -> Iterator[tuple[Tensor, Tensor]]:
        yield features.float(), labels

    def bank_rows(shift: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for begin in range(0, rows, step):
            chunk, chunk_labels = frozen[begin : begin + step], bank_labels[begin : begin + step]
            yield kernels.translate_(chunk, chunk_labels, frozen_mean, shift, scale, moved), chunk_labels

    def both() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batch_rows()
        yield from bank_rows(tuned_mean)

    settings = offset, label_smoothing
    if turn is None:
        return head_pass(
            both(), max(batch, step), batch, head, *settings, keep_logits, needs, kernels.rows_gradient_
        )
    turned = torch.cat([head, tuned_mean]) @ turn  # W R, then mu R: one product, which reads R once
    task = head_pass(batch_rows(), batch, batch, head, *settings, keep_logits, needs, kernels.rows_gradient_)
    bank = head_pass(
        bank_rows(turned[classes:]),
        step,
        0,
        turned[:classes],
        *settings,
        False,
        [False, needs[1], needs[2]],
        kernels.rows_gradient_,
    )
    return HeadPass(
        task.total + bank.total,
        task.logits,
        task.grad_features,
        torch.addmm(task.grad_weight, bank.grad_weight, turn.T) if needs[1] else task.grad_weight,
        task.grad_bias + bank.grad_bias,
    )
