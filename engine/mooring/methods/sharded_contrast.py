"""Contrast with class queues that ranks hold a part of each: sums over ranks in place of the keys.

Every rank scores the queries of all against its own keys; of each query two numbers and the gradient are summed. The
result is the loss over the whole queue, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mooring.collectives import Pending, all_reduce_, begin_gather_rows, begin_reduce_rows
from mooring.distributed import Ranks
from mooring.methods.bank import FeatureBank
from mooring_kernels import patch_match_info_nce
from mooring_kernels.patch_match_info_nce.reference import POSITIVE_CHOICES, rank_codes
from mooring_kernels.queue_info_nce.sums import queue_sums
from mooring_kernels.runtime.once import require_first_derivative

_ROWS, _SUMS, _GRADIENT = "queue queries", "queue sums", "queue gradient"


class Shares(NamedTuple):
    """What one rank's keys add to ``LSE_j l_ij - mean_{j in pos(i)} l_ij - log |pos(i)|`` of each query i of all ranks.

    Attributes:
        terms: [W B, t] with graph; ``sum_j exp(l_ij)`` over this rank's keys is the row's sum of factor exp(term).
        factors: as terms.
        positive_sum: [W B] with graph, sum of the positives' logits.
        positives: [W B], their number.
    """

    terms: Tensor
    factors: Tensor
    positive_sum: Tensor
    positives: Tensor


class SharedQueries:
    """Rows of this rank's batch, on their way to all ranks: begin early, other work goes on beside the exchange.

    Args:
        ranks: who takes part.
        labels: [B] int64.
        rows: name -> [B, ...], float32 or int64.
    """

    def __init__(self, ranks: Ranks, labels: Tensor, **rows: Tensor) -> None:
        self.ranks, self.labels = ranks, labels
        self._pending = {name: begin_gather_rows(each, ranks, _ROWS) for name, each in rows.items()}
        self._pending["labels"] = begin_gather_rows(labels, ranks, _ROWS)
        self._every: dict[str, Tensor] = {}

    def add(self, **rows: Tensor) -> None:
        """Sends further rows of the same batch."""
        self._pending |= {name: begin_gather_rows(each, self.ranks, _ROWS) for name, each in rows.items()}

    def __getitem__(self, name: str) -> Tensor:
        """[W B, ...], the rows of all ranks."""
        if name not in self._every:
            self._every[name] = self._pending.pop(name).wait()
        return self._every[name]

    def own_part(self) -> slice:
        rows = self.labels.shape[0]
        return slice(self.ranks.rank * rows, (self.ranks.rank + 1) * rows)


def sharded_info_nce(
    query: Tensor,
    own_key: Tensor,
    every_query: Tensor,
    shared: SharedQueries,
    queue: FeatureBank,
    field: str,
    temperature: float,
) -> Tensor:
    """``mooring_kernels.queue_info_nce`` of this rank's queries against the queue of all ranks.

    Args:
        query: [B, D] float32 unit rows; may require a gradient.
        own_key: [B, D] float32; may require a gradient.
        every_query: [W B, D], those of all ranks, without gradient.
        shared: the batch's labels.
        queue: sharded, a ring per class.
        field: its rows.
        temperature: T.

    Returns:
        The mean over this rank's valid rows, fp32 scalar.
    """
    bank, labels, own = queue.view(), shared["labels"], shared.own_part()

    def shares(queries: Tensor, own_keys: Tensor) -> Shares:
        log_sum, positive_sum, positives = queue_sums(queries, labels, bank[field], bank.labels, temperature)
        own_logit = (queries[own] * own_keys).sum(1) / temperature
        # each rank's own keys are keys of its own queries alone
        own_term = _placed(own_logit, own, labels, -torch.inf)
        terms = torch.stack([log_sum, own_term], 1)
        return Shares(
            terms,
            torch.ones_like(terms),
            positive_sum + _placed(own_logit, own, labels, 0.0),
            positives + _placed(torch.ones_like(own_logit), own, labels, 0.0),
        )

    return _contrast(query, own_key, every_query, shared, shares)


def sharded_patch_info_nce(
    query: Tensor,
    own_key: Tensor,
    shared: SharedQueries,
    queue: FeatureBank,
    positive_pick: Tensor,
    temperature: float,
    *,
    negatives_per_set: int,
    epsilon: float,
    rounds: int,
) -> Tensor:
    """``mooring_kernels.patch_match_info_nce`` of this rank's images against the queue of all ranks.

    Args:
        query: [B, P, D] float32 unit rows; may require a gradient.
        own_key: [B, P, D] float32 unit rows, without gradient.
        shared: of the batch ``query``, ``own_key``, ``negatives`` [B, M] and the labels.
        queue: sharded, a ring per class, with the field ``patches``.
        positive_pick: [W B, 1 + K] int64, of the rows of all ranks.
        temperature, negatives_per_set, epsilon, rounds: as for the op.

    Returns:
        The mean over this rank's valid rows, fp32 scalar.
    """
    labels = shared["labels"]
    every_key = _without(shared["own_key"], labels < 0)
    slots = queue.spec.rows
    bank = queue.view()
    keys = bank["patches"].unflatten(0, (-1, slots))  # [C here, K, P, D]
    filled = bank.labels.view(-1, slots) >= 0
    every_negative, ring = shared["negatives"], queue.rings(labels)
    negatives = torch.where(every_negative == labels[:, None], -1, queue.rings(every_negative))
    options: dict[str, Any] = {"negatives_per_set": negatives_per_set, "epsilon": epsilon, "rounds": rounds}
    mine = torch.zeros_like(labels, dtype=torch.bool)
    mine[shared.own_part()] = True
    here = (ring >= 0)[:, None] & filled[ring.clamp_min(0)]  # [W B, K] positive key sets
    several = max(1, shared.labels.shape[0])

    def against(queries: Tensor, keys: Tensor, filled: Tensor, negatives: Tensor, blank: int) -> Tensor:
        """``LSE(own pair, pairs of the negatives) - own pair``, [W B]: the label names a ring without keys."""
        filled = filled.clone()
        filled[blank] = False
        return patch_match_info_nce(
            queries, every_key, torch.where(labels >= 0, blank, -1), keys, filled, negatives, positive_pick,
            temperature, reduction="none", **options,
        )  # fmt: skip

    def shares(queries: Tensor, _: Tensor) -> Shares:
        def picked(rows: Tensor, where: Tensor, pick: Tensor) -> Tensor:
            chosen = _chosen_entries(queries.detach(), rows, where, pick, several, epsilon, rounds)
            return _pair_cosines(queries, rows, where, chosen) / temperature

        own = picked(
            every_key, torch.arange(len(labels), device=labels.device)[:, None], positive_pick[:, :1]
        )
        # the first ring lends the others its place as one without keys, and then comes by itself
        parts = [
            against(queries, keys, filled, torch.where(negatives == 0, -1, negatives), 0),
            against(
                queries,
                torch.cat([keys[:1]] * 2),
                torch.cat([filled[:1]] * 2),
                torch.where(negatives == 0, 0, -1),
                1,
            ),
        ]
        sets = ring.clamp_min(0)[:, None] * slots + torch.arange(slots, device=labels.device)
        positive = picked(keys.flatten(0, 1), sets, positive_pick[:, 1:])
        terms = torch.cat(
            [torch.stack(parts, 1) + own, own, positive.masked_fill(~here, -torch.inf)],
            1,
        )
        factors = torch.ones_like(terms)
        factors[:, len(parts)] = mine.float() - len(parts)  # each part holds the own pair once more
        positive_sum = torch.where(mine, own[:, 0], 0) + torch.where(here, positive, 0).sum(1)
        return Shares(terms, factors, positive_sum, mine + here.sum(1).float())

    return _contrast(query, own_key, shared["query"], shared, shares)


def _placed(values: Tensor, own: slice, labels: Tensor, filling: float) -> Tensor:
    """[W B]: this rank's values at its rows, the filling elsewhere."""
    before = values.new_full((own.start,), filling)
    after = values.new_full((labels.shape[0] - own.stop,), filling)
    return torch.cat([before, values, after])


@torch.no_grad()
def _chosen_entries(
    queries: Tensor, rows: Tensor, where: Tensor, pick: Tensor, several: int, epsilon: float, rounds: int
) -> Tensor:
    """Of each plan between query i and the key set ``rows[where[i, s]]``, that of the three largest entries which
    ``pick`` names; flat, [W B, S]. ``several`` queries at a time: the key sets are copied."""
    choices = min(POSITIVE_CHOICES, queries.shape[1] ** 2)
    found = []
    for query, index, choice in zip(*(each.split(several) for each in (queries, where, pick)), strict=True):
        cosine = torch.einsum("bpd,bsqd->bspq", query, rows[index].float())
        ranked = rank_codes(cosine, epsilon, rounds).topk(choices, dim=2).indices
        found.append(ranked.gather(2, choice.clamp(0, choices - 1)[:, :, None])[:, :, 0])
    return torch.cat(found)


def _pair_cosines(queries: Tensor, rows: Tensor, where: Tensor, chosen: Tensor) -> Tensor:
    """Cosine of patch a of the query with patch b of the key set, where entry a P + b was chosen; [W B, S]."""
    patches, width = queries.shape[1:]
    query = queries.gather(1, (chosen // patches)[:, :, None].expand(-1, -1, width))
    return (query * rows[where, chosen % patches].float()).sum(2)


def _contrast(
    query: Tensor,
    own_key: Tensor,
    every_query: Tensor,
    shared: SharedQueries,
    shares: Callable[[Tensor, Tensor], Shares],
) -> Tensor:
    """Mean over this rank's valid rows."""
    with torch.autocast(query.device.type, enabled=False):
        needs = [torch.is_grad_enabled() and each.requires_grad for each in (query, own_key)]
        losses = _Contrast.apply(query, own_key, every_query, shared, shares, needs)
        return losses.sum() / (shared.labels >= 0).sum().clamp_min(1)


class _Contrast(torch.autograd.Function):
    """Losses [B] of this rank's rows; what the backward needs is on its way when the forward ends."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        own_key: Tensor,
        every_query: Tensor,
        shared: SharedQueries,
        shares: Callable[[Tensor, Tensor], Shares],
        needs: list[bool],
    ) -> Tensor:
        ranks, own = shared.ranks, shared.own_part()
        valid = shared["labels"] >= 0
        queries = _without(every_query, ~valid).requires_grad_(needs[0])
        own_keys = _without(own_key.detach(), ~valid[own]).requires_grad_(needs[1])
        with torch.set_grad_enabled(any(needs)):
            part = shares(queries, own_keys)
            peak = ranks.all_reduce_(part.terms.detach().amax(1), "max", _SUMS)
            mass = (part.factors * torch.exp(part.terms - peak[:, None])).sum(1)
        sums = torch.stack([mass.detach(), part.positive_sum.detach(), part.positives])
        total, positive_sum, positives = all_reduce_(sums, ranks, _SUMS)
        losses = torch.where(valid, total.log() + peak - positive_sum / positives - positives.log(), 0)
        ctx.pending, ctx.own_grad = None, None
        leaves = [leaf for leaf, needed in zip((queries, own_keys), needs, strict=True) if needed]
        if leaves:
            with torch.enable_grad():  # this rank's share of the gradient of all losses: each row has its own
                slope = torch.where(valid, mass / total - part.positive_sum / positives, 0).sum()
            grads = list(torch.autograd.grad(slope, leaves))
            if needs[0]:
                ctx.pending = begin_reduce_rows(grads.pop(0), ranks, _GRADIENT)
            if needs[1]:
                ctx.own_grad = grads.pop(0)
        return losses[own]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        require_first_derivative("sharded contrast")
        (grad_losses,) = grad_outputs

        def scaled(unit: Tensor) -> Tensor:
            return unit * grad_losses.view(-1, *[1] * (unit.dim() - 1))

        pending: Pending | None = ctx.pending
        return (
            None if pending is None else scaled(pending.wait()),
            None if ctx.own_grad is None else scaled(ctx.own_grad),
            *[None] * 4,
        )


def _without(rows: Tensor, masked: Tensor) -> Tensor:
    """The rows with zeros where masked, whatever is there."""
    return rows.float().masked_fill(masked.view(-1, *[1] * (rows.dim() - 1)), 0)
