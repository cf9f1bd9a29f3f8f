"""Concept-level contrast in Triton: one program per image and group of key sets, rounds in registers.

The first kernel forms the cosines of a group, solves its transports in the logarithmic domain and writes the
pairs it chose, one byte and one cosine each; no [B, C K, P, P] tensor exists. The softmax over those pairs is
torch's. The second kernel adds the weighted keys of the pairs; its partial sums are combined in a fixed order.
"""

# Triton's types know neither the launch options (num_warps) nor the element type of a pointer.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mooring_kernels.patch_match_info_nce.reference import POSITIVE_CHOICES, class_roles
from mooring_kernels.runtime.triton_launch import next_power_of_two, on_device_of

_SIDE = 16  # patches of a set, padded; also the least that tl.dot takes
_SETS = 4  # key sets of a program
_SPLITS = 64  # programs that share the gradient of an image
_BLOCK_D = 16


@triton.jit(do_not_specialize=["N", "rounds"])
def patch_match_info_nce_fwd_kernel(
    query_ptr: tl.tensor,
    own_key_ptr: tl.tensor,
    queue_ptr: tl.tensor,
    take_ptr: tl.tensor,
    entry_ptr: tl.tensor,
    cosine_ptr: tl.tensor,
    N: int,
    epsilon: float,
    rounds: int,
    P: tl.constexpr,
    D: tl.constexpr,
    MOST: tl.constexpr,
    SIDE: tl.constexpr,
    SETS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    image = tl.program_id(0).to(tl.int64)
    sets = tl.program_id(1).to(tl.int64) * SETS + tl.arange(0, SETS)  # [SETS]; set N is the image's own key
    take = tl.load(take_ptr + image * (N + 1) + sets, mask=sets <= N, other=0)  # [SETS]
    out = (image * (N + 1) + sets) * MOST  # [SETS]

    patch = tl.arange(0, SIDE)  # [SIDE]
    rows = tl.arange(0, SETS * SIDE)  # [SETS SIDE]
    set_of_row = tl.program_id(1).to(tl.int64) * SETS + rows // SIDE
    key = rows % SIDE
    # sets that nobody takes are not read: an empty slot may hold anything
    taken = tl.load(take_ptr + image * (N + 1) + set_of_row, mask=set_of_row <= N, other=0) != 0
    real = taken & (key < P)
    total = tl.zeros([SIDE, SETS * SIDE], dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        query = tl.load(
            query_ptr + (image * P + patch[:, None]) * D + columns[None, :],
            mask=(patch < P)[:, None] & (columns < D)[None, :],
            other=0.0,
        ).to(tl.float32)  # [SIDE, BLOCK_D]
        inside = real[None, :] & (columns < D)[:, None]  # [BLOCK_D, SETS SIDE]
        keys = tl.load(
            queue_ptr + (set_of_row * P + key)[None, :] * D + columns[:, None],
            mask=inside & (set_of_row < N)[None, :],
            other=0.0,
        ).to(tl.float32)
        keys += tl.load(
            own_key_ptr + (image * P + key)[None, :] * D + columns[:, None],
            mask=inside & (set_of_row == N)[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.dot(query, keys, input_precision="ieee")
    cosine = tl.permute(tl.reshape(total, [SIDE, SETS, SIDE]), (1, 0, 2))  # [SETS, SIDE, SIDE]

    in_row = (patch < P)[None, :]  # [1, SIDE]
    in_plan = (patch < P)[None, :, None] & (patch < P)[None, None, :]  # [1, SIDE, SIDE]
    # finite, so that no difference of infinities arises in the padding
    score = tl.where(in_plan, (cosine - 1.0) / epsilon, -1e30)
    u = tl.zeros([SETS, SIDE], dtype=tl.float32)
    v = tl.zeros([SETS, SIDE], dtype=tl.float32)
    for _ in range(rounds):
        moved = score + v[:, None, :]
        peak = tl.max(moved, axis=2)
        u = tl.where(in_row, -peak - tl.log(tl.sum(tl.exp(moved - peak[:, :, None]), axis=2)), 0.0)
        moved = score + u[:, :, None]
        peak = tl.max(moved, axis=1)
        v = tl.where(in_row, -peak - tl.log(tl.sum(tl.exp(moved - peak[:, None, :]), axis=1)), 0.0)

    # Codes as in the definition (reference.rank_codes).
    own = score + u[:, :, None] + v[:, None, :]
    share = tl.exp(own)
    dominant = share > 0.6
    others = tl.sum(tl.where(dominant, 0.0, share), axis=1)  # [SETS, SIDE]
    complement = -tl.log(tl.maximum(others, 1.1754943508222875e-38))
    value = tl.where(dominant, complement[:, None, :], own) * 32.0
    # 1.5 2^23 rounds to an integer; far below, the clamp decides
    value = (tl.maximum(value, -32767.0) + 12582912.0) - 12582912.0
    index = patch[:, None] * P + patch[None, :]  # [SIDE, SIDE]
    code = tl.where(in_plan, value * 256.0 + (255 - index)[None, :, :].to(tl.float32), -1e30)
    # A NaN leaves no order and must show; maxima pass it over, a sum does not.
    whole = tl.sum(tl.sum(tl.where(in_plan, code, 0.0), axis=2), axis=1)  # [SETS]

    for rank in range(MOST):
        best = tl.max(tl.max(code, axis=2), axis=1)  # [SETS]
        hit = code == best[:, None, None]
        entry = tl.max(tl.max(tl.where(hit & in_plan, index[None, :, :], 0), axis=2), axis=1)
        found = tl.sum(tl.sum(tl.where(hit, cosine, 0.0), axis=2), axis=1)
        found = tl.where(whole == whole, found, whole)
        chosen = ((take > 0) & (rank < take)) | (take == -1 - rank)
        tl.store(entry_ptr + out + rank, entry.to(tl.uint8), mask=sets <= N)
        tl.store(cosine_ptr + out + rank, tl.where(chosen, found, float("-inf")), mask=sets <= N)
        code = tl.where(hit, -1e30, code)


@triton.jit(do_not_specialize=["N", "sets_per_split"])
def patch_match_info_nce_bwd_kernel(
    own_key_ptr: tl.tensor,
    queue_ptr: tl.tensor,
    entry_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    N: int,
    sets_per_split: int,
    P: tl.constexpr,
    D: tl.constexpr,
    MOST: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    image = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1).to(tl.int64) * sets_per_split
    columns = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    patch = tl.arange(0, SIDE)  # [SIDE]
    grad = tl.zeros([SIDE, BLOCK_D], dtype=tl.float32)
    for first in range(0, sets_per_split * MOST, BLOCK_E):
        pair = first + tl.arange(0, BLOCK_E)  # [BLOCK_E]
        sets = begin + pair // MOST
        there = (pair < sets_per_split * MOST) & (sets <= N)
        at = (image * (N + 1) + begin) * MOST + pair
        weight = tl.load(weight_ptr + at, mask=there, other=0.0)  # [BLOCK_E]
        entry = tl.load(entry_ptr + at, mask=there, other=0).to(tl.int32)
        read = (there & (weight != 0.0))[:, None] & (columns < D)[None, :]  # [BLOCK_E, BLOCK_D]
        key = entry % P
        keys = tl.load(
            queue_ptr + (sets * P + key)[:, None] * D + columns[None, :],
            mask=read & (sets < N)[:, None],
            other=0.0,
        ).to(tl.float32)
        keys += tl.load(
            own_key_ptr + (image * P + key)[:, None] * D + columns[None, :],
            mask=read & (sets == N)[:, None],
            other=0.0,
        ).to(tl.float32)
        spread = tl.where(patch[:, None] == (entry // P)[None, :], weight[None, :], 0.0)  # [SIDE, BLOCK_E]
        grad += tl.dot(spread, keys, input_precision="ieee")
    row = (image * tl.num_programs(1) + tl.program_id(1)) * P + patch  # [SIDE]
    tl.store(
        partial_ptr + row[:, None] * D + columns[None, :],
        grad,
        mask=(patch < P)[:, None] & (columns < D)[None, :],
    )


def _taken(
    labels: Tensor,
    queue_valid: Tensor,
    negative_classes: Tensor,
    positive_pick: Tensor,
    count: int,
    choices: int,
) -> tuple[Tensor, Tensor]:
    """[B, N + 1] int32: how many entries a set gives, -r for its r-th alone; and which rows are valid."""
    classes = queue_valid.shape[0]
    negative, positive = class_roles(labels, negative_classes, classes)
    rank = -1 - positive_pick.clamp(0, choices - 1)  # [B, 1 + K]
    of_slots = torch.where(
        positive[:, :, None], rank[:, None, 1:], torch.where(negative, count, 0)[:, :, None]
    )
    of_slots = torch.where(queue_valid, of_slots, 0).flatten(1)
    own = torch.where(positive.any(1), rank[:, 0], 0)
    return torch.cat([of_slots, own[:, None]], 1).to(torch.int32), positive.any(1)


def patch_match_info_nce_fwd(
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
) -> tuple[Tensor, Tensor]:
    """Loss per image [B] and, if asked for, its gradient [B, P, D] (else an empty tensor), both fp32."""
    query, own_key, queue = query.contiguous(), own_key.contiguous(), queue.contiguous()
    batch, patches, width = query.shape
    sets, device = queue.shape[0] * queue.shape[1], query.device
    choices = min(POSITIVE_CHOICES, patches * patches)
    most = max(negatives_per_set, choices)
    grad = torch.empty(query.shape if with_gradient else (0,), dtype=torch.float32, device=device)
    if batch == 0:
        return torch.empty(0, dtype=torch.float32, device=device), grad
    take, valid = _taken(labels, queue_valid, negative_classes, positive_pick, negatives_per_set, choices)
    entry = torch.empty((batch, sets + 1, most), dtype=torch.uint8, device=device)
    cosine = torch.empty((batch, sets + 1, most), dtype=torch.float32, device=device)
    with on_device_of(query):
        patch_match_info_nce_fwd_kernel[(batch, triton.cdiv(sets + 1, _SETS))](
            query,
            own_key,
            queue,
            take,
            entry,
            cosine,
            sets,
            float(epsilon),
            rounds,
            P=patches,
            D=width,
            MOST=most,
            SIDE=_SIDE,
            SETS=_SETS,
            BLOCK_D=_BLOCK_D,
            num_warps=4,
        )
    logits = cosine.div_(temperature)
    lse = torch.logsumexp(logits.flatten(1), 1)  # [B]; -inf for a masked row
    positive = (take < 0)[:, :, None] & (logits != -math.inf)  # one entry of each positive set
    count = positive.sum((1, 2)).clamp_min(1)
    mean = torch.where(positive, logits, 0.0).sum((1, 2)) / count
    loss = torch.where(valid, lse - mean - count.log(), 0.0)
    if not with_gradient:
        return loss, grad
    weight = torch.exp(logits - torch.where(valid, lse, 0.0)[:, None, None])
    weight = (weight - torch.where(positive, 1.0 / count[:, None, None], 0.0)) / temperature
    splits = min(_SPLITS, sets // _SETS + 1)
    partial = torch.empty((batch, splits, patches, width), dtype=torch.float32, device=device)
    block_d = min(max(next_power_of_two(width), 16), 64)
    with on_device_of(query):
        patch_match_info_nce_bwd_kernel[(batch, splits, triton.cdiv(width, block_d))](
            own_key,
            queue,
            entry,
            weight,
            partial,
            sets,
            triton.cdiv(sets + 1, splits),
            P=patches,
            D=width,
            MOST=most,
            SIDE=_SIDE,
            BLOCK_E=32,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return loss, partial.sum(1)
