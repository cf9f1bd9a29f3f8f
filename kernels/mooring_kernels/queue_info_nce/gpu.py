"""InfoNCE against a queue in Triton: a flash-style pass, the queue split over programs, then one combine.

A batch has few queries, so a program takes a block of them and one chunk of the queue, and leaves the softmax of
its chunk unfinished; the combine adds the chunks in order, so that the result is the same every time. fp32 dots
run as ``tf32x3``: three tensor-core products that keep about 22 bits of the factors, where ``tf32`` keeps 11, too few
for logits over T = 0.07, and ``ieee`` would leave the tensor cores.
"""

# Triton's types know neither the launch options (num_warps) nor the element type of a pointer.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mooring_kernels.queue_info_nce.chunks import queue_info_nce_in_chunks
from mooring_kernels.runtime.triton_launch import next_power_of_two, on_device_of

WIDEST = 256  # of a row that a program holds; wider ones take the library's GEMMs
_QUERIES = 16  # of a program: the least that tl.dot takes
_ROWS = 32  # of the queue at once
_TERMS = 32  # features at once
_WARPS = 8
_MOST_CHUNKS = 64  # bounds the memory of the parts, whatever N
_LEAST_CHUNK_ROWS = 256  # writing a part costs as much as reading D rows


@triton.jit(do_not_specialize=["B", "N", "chunk_rows"])
def queue_info_nce_fwd_kernel(
    query_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    queue_ptr: tl.tensor,
    queue_labels_ptr: tl.tensor,
    scalars_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    B: int,
    N: int,
    chunk_rows: int,
    inverse_temperature: float,
    D: tl.constexpr,
    stride_query_b: tl.constexpr,
    stride_query_d: tl.constexpr,
    stride_labels_b: tl.constexpr,
    stride_queue_n: tl.constexpr,
    stride_queue_d: tl.constexpr,
    stride_queue_labels_n: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TERMS: tl.constexpr,
) -> None:
    chunk = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_rows, in_columns = rows < B, columns < D
    label = tl.load(labels_ptr + rows * stride_labels_b, mask=in_rows, other=-1)  # [BLOCK_B]
    valid = label >= 0
    peak = tl.full([BLOCK_B], float("-inf"), dtype=tl.float32)  # largest logit so far
    total = tl.zeros([BLOCK_B], dtype=tl.float32)  # sum of exp(logit - peak)
    positive_sum = tl.zeros([BLOCK_B], dtype=tl.float32)  # of logits
    positives = tl.zeros([BLOCK_B], dtype=tl.float32)
    if GRADIENT:
        weighted = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)  # sum of exp(logit - peak) key
        positive_keys = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)  # sum
    begin = chunk * chunk_rows
    end = tl.minimum(begin + chunk_rows, N)
    for first in range(begin, end, BLOCK_N):
        slots = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        key_label = tl.load(queue_labels_ptr + slots * stride_queue_labels_n, mask=slots < end, other=-1)
        filled = key_label >= 0  # [BLOCK_N]; an empty slot is not read
        inside = filled[:, None] & in_columns[None, :]  # [BLOCK_N, BLOCK_D]
        logits = tl.zeros([BLOCK_B, BLOCK_N], dtype=tl.float32)
        # in pieces: a whole query as an operand, held by each warp twice for tf32x3, would fill the registers
        for piece in range(0, D, BLOCK_TERMS):
            terms = piece + tl.arange(0, BLOCK_TERMS)  # [BLOCK_TERMS]
            in_terms = (terms < D)[None, :]
            query = tl.load(
                query_ptr + rows[:, None] * stride_query_b + terms[None, :] * stride_query_d,
                mask=valid[:, None] & in_terms,
                other=0.0,
            ).to(tl.float32)  # [BLOCK_B, BLOCK_TERMS]
            key_terms = tl.load(
                queue_ptr + slots[:, None] * stride_queue_n + terms[None, :] * stride_queue_d,
                mask=filled[:, None] & in_terms,
                other=0.0,
            ).to(tl.float32)  # [BLOCK_N, BLOCK_TERMS]
            logits += tl.dot(query, tl.trans(key_terms), input_precision="tf32x3")
        logits *= inverse_temperature
        logits = tl.where(filled[None, :], logits, float("-inf"))
        raised = tl.maximum(peak, tl.max(logits, axis=1))  # [BLOCK_B]
        origin = tl.where(raised == float("-inf"), 0.0, raised)  # -inf - -inf would be NaN
        shrink = tl.exp(peak - origin)  # [BLOCK_B]
        weights = tl.exp(logits - origin[:, None])  # [BLOCK_B, BLOCK_N]
        total = total * shrink + tl.sum(weights, axis=1)
        peak = raised
        match = (key_label[None, :] == label[:, None]) & valid[:, None]  # [BLOCK_B, BLOCK_N]
        positive_sum += tl.sum(tl.where(match, logits, 0.0), axis=1)
        positives += tl.sum(match.to(tl.float32), axis=1)
        if GRADIENT:
            # a second time, from the cache
            keys = tl.load(
                queue_ptr + slots[:, None] * stride_queue_n + columns[None, :] * stride_queue_d,
                mask=inside,
                other=0.0,
            ).to(tl.float32)  # [BLOCK_N, BLOCK_D]
            weighted = weighted * shrink[:, None] + tl.dot(weights, keys, input_precision="tf32x3")
            # the slots of a class often lie together: most tiles hold no positive
            if tl.max(tl.max(match.to(tl.int32), axis=1), axis=0) > 0:
                positive_keys += tl.dot(match.to(tl.float32), keys, input_precision="tf32x3")

    # scalars [4, chunks, B]: peak, total, positive_sum, positives; sums [2, chunks, B, D]
    chunks = tl.num_programs(1)
    at = scalars_ptr + chunk * B + rows
    tl.store(at, peak, mask=in_rows)
    tl.store(at + chunks * B, total, mask=in_rows)
    tl.store(at + 2 * chunks * B, positive_sum, mask=in_rows)
    tl.store(at + 3 * chunks * B, positives, mask=in_rows)
    if GRADIENT:
        inside = in_rows[:, None] & in_columns[None, :]
        place = sums_ptr + (chunk * B + rows)[:, None] * D + columns[None, :]
        tl.store(place, weighted, mask=inside)
        tl.store(place + chunks.to(tl.int64) * B * D, positive_keys, mask=inside)


@triton.jit(do_not_specialize=["B", "CHUNKS"])
def queue_info_nce_combine_kernel(
    query_ptr: tl.tensor,
    own_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    scalars_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    positives_ptr: tl.tensor,
    grad_query_ptr: tl.tensor,
    own_factor_ptr: tl.tensor,
    B: int,
    CHUNKS: int,
    inverse_temperature: float,
    D: tl.constexpr,
    stride_query_b: tl.constexpr,
    stride_query_d: tl.constexpr,
    stride_own_b: tl.constexpr,
    stride_own_d: tl.constexpr,
    stride_labels_b: tl.constexpr,
    OWN: tl.constexpr,
    GRAD_QUERY: tl.constexpr,
    GRAD_OWN: tl.constexpr,
    MOST_CHUNKS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_columns = columns < D
    valid = tl.load(labels_ptr + row * stride_labels_b) >= 0

    chunk = tl.arange(0, MOST_CHUNKS)  # [MOST_CHUNKS]
    known, step = chunk < CHUNKS, CHUNKS * B
    at = scalars_ptr + chunk * B + row
    peaks = tl.load(at, mask=known, other=float("-inf"))  # [MOST_CHUNKS]
    totals = tl.load(at + step, mask=known, other=0.0)
    positive_sum = tl.sum(tl.load(at + 2 * step, mask=known, other=0.0), axis=0)
    positives = tl.sum(tl.load(at + 3 * step, mask=known, other=0.0), axis=0)
    peak = tl.max(peaks, axis=0)
    own_logit = 0.0
    own_term = 0.0
    if OWN:
        query = tl.load(
            query_ptr + row * stride_query_b + columns * stride_query_d, mask=in_columns & valid, other=0.0
        ).to(tl.float32)  # [BLOCK_D]
        own = tl.load(
            own_ptr + row * stride_own_b + columns * stride_own_d, mask=in_columns & valid, other=0.0
        ).to(tl.float32)  # [BLOCK_D]
        own_logit = tl.sum(query * own, axis=0) * inverse_temperature
        positive_sum += own_logit
        positives += 1.0
        peak = tl.maximum(peak, own_logit)
    counted = valid & (positives > 0.0)
    origin = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp(peaks - origin) * totals, axis=0)
    if OWN:
        own_term = tl.exp(own_logit - origin)
        total += own_term
    positives = tl.where(counted, positives, 0.0)
    share = 1.0 / tl.maximum(positives, 1.0)
    total = tl.where(counted, total, 1.0)
    loss = tl.log(total) + (origin - positive_sum * share) + tl.log(share)
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0))
    tl.store(positives_ptr + row, positives)
    if GRAD_OWN:
        factor = (own_term / total - share) * inverse_temperature
        tl.store(own_factor_ptr + row, tl.where(counted, factor, 0.0))
    if GRAD_QUERY:
        grad = tl.zeros([BLOCK_D], dtype=tl.float32)
        for first in range(0, CHUNKS, BLOCK_CHUNKS):
            some = first + tl.arange(0, BLOCK_CHUNKS)  # [BLOCK_CHUNKS]
            in_some = some < CHUNKS
            peaks_here = tl.load(scalars_ptr + some * B + row, mask=in_some, other=float("-inf"))
            weight = tl.exp(peaks_here - origin) / total  # [BLOCK_CHUNKS]
            inside = in_some[:, None] & in_columns[None, :]
            place = sums_ptr + (some.to(tl.int64) * B + row)[:, None] * D + columns[None, :]
            weighted = tl.load(place, mask=inside, other=0.0)  # [BLOCK_CHUNKS, BLOCK_D]
            beyond = sums_ptr + ((CHUNKS + some).to(tl.int64) * B + row)[:, None] * D + columns[None, :]
            keys = tl.load(beyond, mask=inside, other=0.0)
            grad += tl.sum(weight[:, None] * weighted - share * keys, axis=0)
        if OWN:
            grad += (own_term / total - share) * own
        grad = tl.where(counted, grad * inverse_temperature, 0.0)
        tl.store(grad_query_ptr + row * D + columns, grad, mask=in_columns)


def queue_info_nce_fwd(
    query: Tensor,
    own_key: Tensor | None,
    labels: Tensor,
    queue: Tensor,
    queue_labels: Tensor,
    temperature: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and number of positives of each query, gradient of the query and factor of the own key's.

    Args:
        query: [B, D] fp32 or bf16, any strides. own_key: the same, or None.
        labels: [B] int64; a query with a negative one is not read.
        queue: [N, D] fp32 or bf16, any strides.
        queue_labels: [N] int64; a slot with a negative one is not read.
        temperature: T > 0.
        needs: gradient of the query, of the own key.

    Returns:
        losses [B], positives [B], grad_query [B, D] and own_factor [B] fp32; empty where not needed.
    """
    batch, width = query.shape
    if width > WIDEST or batch == 0:
        return queue_info_nce_in_chunks(query, own_key, labels, queue, queue_labels, temperature, needs)
    rows, device = queue.shape[0], query.device
    tiles = -(-rows // _ROWS)
    chunks = max(min(_MOST_CHUNKS, rows // _LEAST_CHUNK_ROWS, tiles), 1)
    chunk_rows = max(-(-tiles // chunks), 1) * _ROWS
    chunks = max(-(-rows // chunk_rows), 1)
    block_width = max(next_power_of_two(width), 16)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    scalars, sums = empty(4, chunks, batch), empty(*((2, chunks, batch, width) if needs[0] else (0,)))
    losses, positives = empty(batch), empty(batch)
    grad_query = empty(*((batch, width) if needs[0] else (0,)))
    own_factor = empty(*((batch,) if needs[1] else (0,)))
    own = query if own_key is None else own_key  # not read where there is none
    with on_device_of(query):
        queue_info_nce_fwd_kernel[(triton.cdiv(batch, _QUERIES), chunks)](
            query,
            labels,
            queue,
            queue_labels,
            scalars,
            sums,
            batch,
            rows,
            chunk_rows,
            1.0 / temperature,
            D=width,
            stride_query_b=query.stride(0),
            stride_query_d=query.stride(1),
            stride_labels_b=labels.stride(0),
            stride_queue_n=queue.stride(0),
            stride_queue_d=queue.stride(1),
            stride_queue_labels_n=queue_labels.stride(0),
            GRADIENT=needs[0],
            BLOCK_B=_QUERIES,
            BLOCK_N=_ROWS,
            BLOCK_D=block_width,
            BLOCK_TERMS=min(block_width, _TERMS),
            num_warps=_WARPS,
            num_stages=2,
        )
        queue_info_nce_combine_kernel[(batch,)](
            query,
            own,
            labels,
            scalars,
            sums,
            losses,
            positives,
            grad_query,
            own_factor,
            batch,
            chunks,
            1.0 / temperature,
            D=width,
            stride_query_b=query.stride(0),
            stride_query_d=query.stride(1),
            stride_own_b=own.stride(0),
            stride_own_d=own.stride(1),
            stride_labels_b=labels.stride(0),
            OWN=own_key is not None,
            GRAD_QUERY=needs[0],
            GRAD_OWN=needs[1],
            MOST_CHUNKS=_MOST_CHUNKS,
            BLOCK_CHUNKS=8,
            BLOCK_D=block_width,
            num_warps=4,
        )
    return losses, positives, grad_query, own_factor
