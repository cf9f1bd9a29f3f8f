"""Memory, traffic and time of one step on one rank: predicted, never measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

from mooring.capacity.partition import (
    BUCKET,
    STAGES,
    Stage,
    States,
    Traffic,
    bank_bytes,
    bank_traffic,
    numbers,
    states,
    traffic,
)
from mooring.capacity.rates import Rates
from mooring.capacity.step import Sizes, Traced, build_subject, sizes, traced_step
from mooring.config.method_settings import CombinedSettings
from mooring.config.schema import RunConfig
from mooring.errors import ConfigError

# What CUDA, cuBLAS and NCCL take beside tensors, and what the allocator cannot use for its pieces.
OVERHEAD_BYTES = 1.5e9
USABLE = 0.92
_TRACED = (8, 16)  # images: two points of a straight line


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal machines."""

    nodes: int
    gpus_per_node: int
    gpu_bytes: float

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, slots=True)
class Line:
    """A quantity of a micro-batch of B images: ``fixed + each * B``."""

    fixed: float
    each: float

    def at(self, batch: int) -> float:
        return max(0.0, self.fixed + self.each * batch)

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> Line:
        each = (second[1] - first[1]) / (second[0] - first[0])
        return cls(first[1] - each * first[0], each)


@dataclass(frozen=True, slots=True)
class Workload:
    """One micro-batch as lines in its size, traced at two sizes."""

    activations: Line
    peak: Line
    flops: Line
    moved: Line
    operations: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """One way to run a step.

    Attributes:
        stage, world, batch, accumulate, checkpointing: the way.
        model: parameters, gradients, optimizer state and communication buffers of one rank.
        activations: worst moment of forward and backward beside them.
        constants: frozen and momentum encoders, constants.
        banks: feature banks.
        sent: bytes of one rank and step.
        seconds: the parts of the step's time: ``compute``, ``memory``, ``optimizer``, ``communication`` (what the
            step waits for).
    """

    stage: Stage
    world: int
    batch: int
    accumulate: int
    checkpointing: bool
    model: States
    activations: float
    constants: float
    banks: float
    sent: Traffic
    seconds: Mapping[str, float]
    overhead: float

    @property
    def memory(self) -> float:
        """Bytes on one rank at the worst moment."""
        return self.model.total + self.activations + self.constants + self.banks + self.overhead

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        return self.world * self.batch * self.accumulate / self.step_seconds

    def fits(self, cluster: Cluster) -> bool:
        return self.memory <= USABLE * cluster.gpu_bytes


@dataclass
class Predictor:
    """Predicts a run's step on any cluster; traces each kind of step once, when it is first asked for.

    Args:
        config: of the run.
        num_classes: C.
        precision: ``fp32`` or ``bf16``.
        rates: of the machines.
        overhead: bytes beside tensors; 0 on a CPU.
    """

    config: RunConfig
    num_classes: int
    precision: str = "bf16"
    rates: Rates = field(default_factory=Rates)
    overhead: float = OVERHEAD_BYTES
    _workloads: dict[bool, Workload] = field(default_factory=dict)
    _peaks: dict[tuple[int, bool], int] = field(default_factory=dict)

    @cached_property
    def sizes(self) -> Sizes:
        return sizes(build_subject(self.config, self.num_classes))

    @cached_property
    def feature_dim(self) -> int:
        return build_subject(self.config, self.num_classes).encoder.feature_dim

    @property
    def bank(self) -> str:
        """How ranks share the feature banks: as the method's settings say."""
        method = self.config.method
        parts = method.parts if isinstance(method, CombinedSettings) else (method,)
        return next((scope for part in parts if (scope := getattr(part, "bank_scope", None))), "gathered")

    @cached_property
    def bucket(self) -> int:
        """Elements of the buffer that DeepSpeed reduces gradients through: as its further settings say."""
        file = self.config.backend.deepspeed_config
        if file is None:
            return BUCKET
        try:
            given = json.loads(file.read_text(encoding="utf-8"))["zero_optimization"]["reduce_bucket_size"]
        except (OSError, ValueError, KeyError, TypeError):
            return BUCKET  # a run says what is wrong with the file
        return int(given) if isinstance(given, int | float) else BUCKET

    def share(self, cluster: Cluster) -> int:
        """Images of one rank in a micro-batch: its share of ``train.batch_size``, rounded up."""
        return ceil(self.config.train.batch_size / cluster.world)

    @cached_property
    def can_checkpoint(self) -> bool:
        try:
            self.workload(checkpointing=True)
        except ConfigError:
            return False
        return True

    def workload(self, *, checkpointing: bool = False) -> Workload:
        if checkpointing not in self._workloads:
            first, second = (self._traced(batch, checkpointing) for batch in _TRACED)
            self._workloads[checkpointing] = _workload(first, second)
        return self._workloads[checkpointing]

    def predict(
        self,
        cluster: Cluster,
        stage: Stage,
        *,
        batch: int | None = None,
        accumulate: int | None = None,
        checkpointing: bool = False,
    ) -> Prediction:
        """One step of the run on a cluster; ``batch``, images of a micro-batch on one GPU, and accumulation are the
        run's own unless given: ``train.batch_size`` shared among all GPUs."""
        train, optimizer = self.config.train, self.config.optimizer
        batch, accumulate = batch or self.share(cluster), accumulate or train.accumulate
        work, world = self.workload(checkpointing=checkpointing), cluster.world
        each = numbers(optimizer.name, stage, momentum=optimizer.momentum > 0)
        model = states(self.sizes, each, stage, world, bucket=self.bucket)
        sent = traffic(
            self.sizes, each, stage, world, accumulate=accumulate,
            bank=bank_traffic(self.sizes, self.bank, world, batch * accumulate, self._statistics(batch * accumulate)),
        )  # fmt: skip
        if world == 1 and accumulate == 1 and stage == 0:
            activations = max(0.0, self._peak_with_gradients(batch, checkpointing) - model.gradients)
        else:
            activations = work.peak.at(batch)
        return Prediction(
            stage=stage,
            world=world,
            batch=batch,
            accumulate=accumulate,
            checkpointing=checkpointing,
            model=model,
            activations=activations,
            constants=self.sizes.frozen,
            banks=bank_bytes(self.sizes, self.bank, world),
            sent=sent,
            seconds=self._seconds(cluster, stage, work, batch, accumulate, model, sent),
            overhead=self.overhead,
        )

    def _peak_with_gradients(self, batch: int, checkpointing: bool) -> int:
        """Where no process group holds on to gradients, they come while activations go: the worst moment of both is
        less than their sum, and no straight line in the batch."""
        key = batch, checkpointing
        if key not in self._peaks:
            self._peaks[key] = self._traced(batch, checkpointing).peak_with_gradients
        return self._peaks[key]

    def _traced(self, batch: int, checkpointing: bool) -> Traced:
        return traced_step(
            self.config, self.num_classes, batch, precision=self.precision, checkpointing=checkpointing
        )

    def _statistics(self, rows: int) -> int:
        """Bytes that a sharded bank sums: two [C, D] sums and C counts, two numbers a row, in fp32."""
        return 4 * (2 * self.num_classes * self.feature_dim + self.num_classes + 2 * rows)

    def _seconds(
        self,
        cluster: Cluster,
        stage: Stage,
        work: Workload,
        batch: int,
        accumulate: int,
        model: States,
        sent: Traffic,
    ) -> dict[str, float]:
        rates, world = self.rates, cluster.world
        compute = accumulate * work.flops.at(batch) / rates.matmul
        memory = accumulate * max(
            work.moved.at(batch) / rates.memory, work.operations * rates.launch - compute
        )

        def send(count: float, collectives: int) -> float:
            return rates.seconds_to_send(count, world, cluster.gpus_per_node, collectives)

        if stage == 3:  # gathers and reductions run beside the layers, forward and backward
            beside = send(
                sent.gradients + sent.parameters, sent.backward_collectives + sent.other_collectives
            )
            communication = max(0.0, beside - compute - memory) + send(sent.banks, 1 if sent.banks else 0)
        else:  # DeepSpeed overlaps nothing by default below stage 3
            collectives = sent.backward_collectives + sent.other_collectives + (1 if sent.banks else 0)
            communication = send(sent.total, collectives)
        # read weights, gradients and state, write weights and state
        shard = world if stage > 0 else 1
        touched = 2 * model.optimizer + (2 * model.parameters + model.gradients) / (
            shard if stage in (1, 2) else 1
        )
        return {
            "compute": compute,
            "memory": max(0.0, memory),
            "optimizer": touched / rates.memory,
            "communication": communication,
        }


def _workload(first: Traced, second: Traced) -> Workload:
    def line(name: str) -> Line:
        return Line.through((first.batch, getattr(first, name)), (second.batch, getattr(second, name)))

    return Workload(
        activations=line("activations"),
        peak=line("peak"),
        flops=line("flops"),
        moved=line("moved"),
        operations=second.operations,
    )


@dataclass(frozen=True, slots=True)
class Advice:
    """The recommended way to run, why, and the ways it was chosen from."""

    chosen: Prediction | None
    reasons: tuple[str, ...]


def advise(predictor: Predictor, cluster: Cluster) -> Advice:
    """The fastest way that fits: stage, checkpointing, and how the images of a step are split.

    The images of an optimizer step stay what the run's settings say; only their split into micro-batches may
    change. Of ways within 2 % of the fastest, the simplest is taken: low stage, no checkpointing, few micro-batches.
    """
    train = predictor.config.train
    share = predictor.share(cluster)
    images = share * train.accumulate  # of one GPU
    splits = [count for count in range(1, images + 1) if images % count == 0 and images // count <= 4096]
    fitting: list[Prediction] = []
    reasons: list[str] = []
    if train.batch_size % cluster.world:
        reasons.append(
            f"train.batch_size={train.batch_size} is no multiple of {cluster.world} processes: counted as "
            f"{share} each, {share * cluster.world} in all"
        )
    for stage in STAGES:
        if stage > 0 and cluster.world == 1:
            break
        plain = predictor.predict(cluster, stage)
        if not plain.fits(cluster):
            reasons.append(
                f"ZeRO {stage} as configured needs {plain.memory / 1e9:.1f} GB of {cluster.gpu_bytes / 1e9:.0f} GB: "
                f"{plain.model.total / 1e9:.1f} for the model, {plain.activations / 1e9:.1f} for activations"
            )
        for checkpointing in (False, True) if predictor.can_checkpoint else (False,):
            for accumulate in splits:
                way = predictor.predict(
                    cluster,
                    stage,
                    batch=images // accumulate,
                    accumulate=accumulate,
                    checkpointing=checkpointing,
                )
                if way.fits(cluster):
                    fitting.append(way)
                    break  # more micro-batches only cost time
    if not fitting:
        reasons.append(
            "nothing fits, down to one image at a time: take more or larger GPUs, or a smaller model"
        )
        return Advice(None, tuple(reasons))
    best = min(way.step_seconds for way in fitting)
    near = [way for way in fitting if way.step_seconds <= 1.02 * best]
    chosen = min(near, key=lambda way: (way.stage, way.checkpointing, way.accumulate))
    reasons.append(
        f"ZeRO {chosen.stage}{' with activation checkpointing' if chosen.checkpointing else ''} is the simplest of "
        f"the ways that fit and are within 2 % of the fastest ({1e3 * best:.1f} ms)"
    )
    if chosen.accumulate != train.accumulate:
        reasons.append(
            f"the {images} images of a GPU and step go through in {chosen.accumulate} micro-batches of {chosen.batch}, "
            f"not {train.accumulate} of {share}"
        )
    waits = chosen.seconds["communication"] / chosen.step_seconds
    if waits > 0.2:
        reasons.append(
            f"{waits:.0%} of the step waits for the network: more images per GPU and step, or a faster link, would pay"
        )
    return Advice(chosen, tuple(reasons))
