"""Where ZeRO puts parameters, gradients and optimizer state, and what it sends for that. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

from mooring.capacity.step import Sizes

Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
# DeepSpeed's defaults, in elements: gradients are reduced through a buffer of this size, which it makes whatever the
# size of the model; ZeRO-3 keeps up to so many gathered parameters, and gathers up to so many ahead, through a buffer.
BUCKET = 500_000_000
LIVE = 1_000_000_000
AHEAD = 50_000_000
_DDP_BUCKET_BYTES = 25 << 20


@dataclass(frozen=True, slots=True)
class Numbers:
    """Bytes per element.

    Attributes:
        parameter: of the weights that compute.
        gradient: of their gradients.
        optimizer: of everything the optimizer keeps, fp32 master weights included where there are any.
    """

    parameter: int
    gradient: int
    optimizer: int


def numbers(optimizer: str, stage: Stage, *, momentum: bool = True) -> Numbers:
    """What an element takes: weights and gradients stay in fp32, in bf16 runs too (autocast).

    Args:
        optimizer: ``sgd`` keeps one moment, the others two.
        stage: of ZeRO; from 1 on DeepSpeed steps an fp32 copy of each rank's part.
        momentum: whether sgd has any.
    """
    moments = (4 if momentum else 0) if optimizer == "sgd" else 8
    return Numbers(parameter=4, gradient=4, optimizer=moments + (4 if stage > 0 else 0))


@dataclass(frozen=True, slots=True)
class States:
    """Bytes on one rank between steps, and of the buffers that communication needs."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.buffers


def states(
    sizes: Sizes, each: Numbers, stage: Stage, world: int, *, accumulate: int = 1, bucket: int = BUCKET
) -> States:
    """Model states of one rank, after Rajbhandari et al., "ZeRO", SC 2020, section 5, with DeepSpeed's buffers.

    Args:
        sizes: of the method.
        each: bytes of an element.
        stage, world: how they are divided.
        accumulate: micro-batches; stage 1 keeps whole gradients from one to the next.
        bucket: elements of the buffer that gradients are reduced through.
    """
    trained, still = sizes.trainable, sizes.parameters - sizes.trainable
    shard = world if stage > 0 else 1
    parameters = (trained / world if stage == 3 else trained) * each.parameter + still * each.parameter
    divided = stage >= 2 or (stage == 1 and accumulate == 1)
    gradients = (trained / world if divided else trained) * each.gradient
    match stage:
        case 0:  # reduced through a flat copy
            buffers = float(min(trained, bucket) * each.gradient if world > 1 else 0)
        case 3:
            gathered = min(trained, LIVE) + min(trained, AHEAD)
            buffers = float(gathered * each.parameter + bucket * each.gradient)
        case _:
            buffers = float(bucket * each.gradient)
    return States(parameters, gradients, trained * each.optimizer / shard, buffers)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one rank sends in one optimizer step, by ring collectives, and how many collectives there are.

    Attributes:
        gradients: reduced.
        parameters: gathered.
        banks: rows or statistics of the feature banks.
        backward_collectives: those that run beside the backward.
        other_collectives: those that are waited for.
    """

    gradients: float
    parameters: float
    banks: float
    backward_collectives: int
    other_collectives: int

    @property
    def total(self) -> float:
        return self.gradients + self.parameters + self.banks


def traffic(
    sizes: Sizes,
    each: Numbers,
    stage: Stage,
    world: int,
    *,
    accumulate: int,
    bank: float,
) -> Traffic:
    """What a step sends.

    An all-reduce of n bytes sends 2 n (W - 1) / W from every rank, a gather or a reduce-scatter half of that.
    Stage 0 reduces once a step; stage 1 too, and gathers the updated weights; stage 2 reduces in every
    micro-batch, whole gradients as stage 1 does; stage 3 scatters what it reduces, and gathers weights in every
    micro-batch: for the forward, and again for the backward those beyond the ``LIVE`` ones that it keeps. So
    DeepSpeed 0.19.8 does by its own defaults, counted in tests/distributed.
    """
    if world == 1:
        return Traffic(0.0, 0.0, 0.0, 0, 0)
    share = (world - 1) / world
    gradients = share * sizes.trainable * each.gradient
    parameters = share * sizes.trainable * each.parameter
    buckets = max(1, ceil(sizes.trainable / BUCKET))
    match stage:
        case 0:
            small = max(1, ceil(sizes.trainable * each.gradient / _DDP_BUCKET_BYTES))
            return Traffic(2 * gradients, 0.0, bank, small, 0)
        case 1:
            return Traffic(2 * gradients, parameters, bank, buckets, buckets)
        case 2:
            return Traffic(2 * accumulate * gradients, parameters, bank, accumulate * buckets, buckets)
        case _:
            again = max(0.0, 1 - LIVE / sizes.parameters)
            gathered = (1 + again) * accumulate * share * sizes.parameters * each.parameter
            blocks = accumulate * sizes.block_count
            return Traffic(accumulate * gradients, gathered, bank, 2 * blocks, blocks)


def bank_traffic(sizes: Sizes, mode: str, world: int, rows: int, statistics: int) -> float:
    """Bytes that one rank sends for its banks in a step.

    Args:
        sizes: of the method.
        mode: ``private``: nothing; ``gathered``: every rank gets all new rows; ``sharded``: so it does, to keep its
            share, and statistics are summed.
        world: ranks.
        rows: new rows of one rank.
        statistics: bytes that are summed where the bank is sharded.
    """
    if world == 1 or not sizes.banks or mode == "private":
        return 0.0
    gathered = (world - 1) * rows * sizes.bank_row
    return gathered if mode == "gathered" else gathered + 2 * (world - 1) / world * statistics


def bank_bytes(sizes: Sizes, mode: str, world: int) -> float:
    """Bytes of the banks on one rank."""
    return sizes.banks / world if mode == "sharded" else sizes.banks
