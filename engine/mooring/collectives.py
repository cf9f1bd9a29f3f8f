"""Exchanges of tensors inside a training step, with gradients where a loss needs them; their bytes are counted."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mooring.distributed import Ranks
from mooring.traffic import TRAFFIC

# the newer name, where there is one: the older warns
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce_(tensor: Tensor, ranks: Ranks, purpose: str) -> Tensor:
    """The sum over ranks, in place, counted; without gradient. Returns the tensor."""
    if ranks.world > 1:
        TRAFFIC.count(tensor, purpose, ranks.world)
        dist.all_reduce(tensor)
    return tensor


def broadcast_(tensor: Tensor, ranks: Ranks, purpose: str) -> Tensor:
    """Rank 0's values, in place, counted. Returns the tensor."""
    if ranks.world > 1:
        TRAFFIC.count(tensor, purpose, ranks.world, "broadcast")
        dist.broadcast(tensor, 0)
    return tensor


def gather_rows(rows: Tensor, ranks: Ranks, purpose: str) -> Tensor:
    """Every rank's rows, rank after rank, on every rank; without gradient.

    Args:
        rows: [B, ...], the same shape and dtype on every rank.
        ranks: who takes part.
        purpose: what the bytes are counted under.

    Returns:
        [world B, ...]; ``rows`` itself on a single rank.
    """
    return begin_gather_rows(rows, ranks, purpose).wait()


class Pending:
    """An exchange that has begun, while the caller goes on."""

    def __init__(self, result: Tensor, work: dist.Work | None = None, sent: Tensor | None = None) -> None:
        self._result, self._work = result, work
        self._sent = sent  # must live until it is sent

    def wait(self) -> Tensor:
        """Its result. On a GPU the stream waits for it, not the host."""
        if self._work is not None:
            self._work.wait()
        self._work = self._sent = None
        return self._result


def begin_gather_rows(rows: Tensor, ranks: Ranks, purpose: str) -> Pending:
    """``gather_rows`` in the background; the exchanges of a rank happen in the order in which they begin."""
    rows = rows.detach()
    if ranks.world == 1:
        return Pending(rows)
    TRAFFIC.count(rows, purpose, ranks.world, "all_gather")
    rows = rows.contiguous()
    every = rows.new_empty(ranks.world * rows.shape[0], *rows.shape[1:])
    return Pending(every, _all_gather(every, rows, async_op=True), rows)


def begin_reduce_rows(rows: Tensor, ranks: Ranks, purpose: str) -> Pending:
    """The sum over ranks of the rows that are this rank's, in the background: ``gather_rows`` the other way.

    Args:
        rows: [world B, ...], one rank's share of every rank's rows, rank after rank; without gradient.
        ranks: who takes part.
        purpose: what the bytes are counted under.

    Returns:
        Pending: [B, ...]; ``rows`` itself on a single rank.
    """
    if ranks.world == 1:
        return Pending(rows)
    TRAFFIC.count(rows, purpose, ranks.world, "reduce_scatter")
    rows = rows.contiguous()
    own = rows.new_empty(rows.shape[0] // ranks.world, *rows.shape[1:])
    return Pending(own, _reduce_scatter(own, rows, async_op=True), rows)


def summed(tensor: Tensor, ranks: Ranks, purpose: str) -> Tensor:
    """The sum over ranks, with gradient: that of the sum of all ranks' losses."""
    if ranks.world == 1:
        return tensor
    return _Summed.apply(tensor, ranks, purpose)


def all_rows(rows: Tensor, ranks: Ranks, purpose: str) -> Tensor:
    """``gather_rows`` with gradient, for a loss that every rank computes from all rows, the same on each.

    The gradient of a rank's own rows is ``world`` times what its loss gives them, so that the mean of the ranks'
    gradients is that of the one loss. Nothing is sent on the way back.

    Args:
        rows: [B, ...], the same shape on every rank.
        ranks: who takes part.
        purpose: what the bytes are counted under.

    Returns:
        [world B, ...].
    """
    if ranks.world == 1:
        return rows
    return _AllRows.apply(rows, ranks, purpose)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks, purpose: str) -> Tensor:
        ctx.ranks, ctx.purpose = ranks, purpose
        return all_reduce_(tensor.detach().clone(memory_format=torch.contiguous_format), ranks, purpose)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grad_outputs
        total = grad.clone(memory_format=torch.contiguous_format)
        return all_reduce_(total, ctx.ranks, ctx.purpose), None, None


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, purpose: str) -> Tensor:
        ctx.ranks, ctx.rows = ranks, rows.shape[0]
        return gather_rows(rows, ranks, purpose)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grad_outputs
        first = ctx.ranks.rank * ctx.rows
        return ctx.ranks.world * grad[first : first + ctx.rows], None, None
