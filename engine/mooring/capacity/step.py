"""One training step of a run, traced on tensors that have shapes and no content: no weights, no data, no GPU.

The method is built on torch's meta device, and its own forward, backward and bank update then run on fake
tensors. So every timm architecture and every method is measured by the code that will train it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mooring.capacity.storages import Ledger
from mooring.config.method_settings import CombinedSettings
from mooring.config.schema import RunConfig
from mooring.config.settings import Settings
from mooring.config.soft_settings import SoftFineTuningSettings
from mooring.data.batch import Batch, named_views
from mooring.errors import ConfigError
from mooring.methods.bank import FeatureBank
from mooring.methods.base import At, Method, Needs, Resources
from mooring.methods.registry import build_method, needs_of
from mooring.models.batchnorm import freeze_statistics
from mooring.models.encoder import Encoder, encoder_of
from mooring.models.head import build_head

_TEXT_WIDTH = 384  # of the default text encoder
# Past every warm-up and every probing phase, before anything has faded out.
MIDWAY = At(step=6000, epoch=60, steps_per_epoch=100, total_steps=10_000)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a method is made of, in elements and bytes; the same on every rank unless it is partitioned.

    Attributes:
        parameters: elements of trained modules.
        trainable: those of them with a gradient.
        largest_block: elements of the largest repeated block, or of the largest single parameter: what ZeRO-3
            must gather at once.
        block_count: modules whose parameters are gathered one after the other.
        frozen: bytes of encoders beside the trained one (frozen, momentum), and of other constants.
        banks: bytes of the feature banks.
        bank_row: bytes that one image adds to the banks.
    """

    parameters: int
    trainable: int
    largest_block: int
    block_count: int
    frozen: int
    banks: int
    bank_row: int


@dataclass(frozen=True, slots=True)
class Traced:
    """One step on one rank, parameters and optimizer aside.

    Attributes:
        batch: images per micro-batch.
        activations: bytes alive at the end of the forward: what the backward needs.
        peak: bytes at the worst moment of forward and backward, without gradients of parameters.
        peak_with_gradients: with those gradients that are there at the time.
        flops: forward and backward.
        moved: bytes read and written by everything that is no matrix product.
        operations: number of operations, each a kernel.
    """

    batch: int
    activations: int
    peak: int
    peak_with_gradients: int
    flops: int
    moved: int
    operations: int


@dataclass(frozen=True, slots=True)
class Subject:
    """The run to trace: a method on the meta device and what its batches look like."""

    config: RunConfig
    method: Method
    encoder: Encoder
    needs: Needs
    num_classes: int
    image_size: int


def build_subject(config: RunConfig, num_classes: int) -> Subject:
    """The method of ``config`` with random weights that are never drawn.

    Raises:
        ConfigError: unknown model, or no such image size.
    """
    settings: Any = config.method
    with torch.device("meta"), _quiet():
        encoder = encoder_of(config, weights="none")
        size = config.train.image_size or int(encoder.data_config["input_size"][-1])
        head = build_head(encoder.feature_dim, num_classes)
        needs = needs_of(settings)
        method = build_method(
            settings, encoder, head, label_smoothing=config.train.label_smoothing,
            resources=_resources(config, needs, encoder, num_classes, size),
        )  # fmt: skip
    if (
        needs.batchnorm or "frozen" if config.train.batchnorm == "auto" else config.train.batchnorm
    ) == "frozen":
        freeze_statistics(encoder)
    return Subject(config, method, encoder, needs, num_classes, size)


def sizes(subject: Subject) -> Sizes:
    """Counts parameters, frozen copies and banks."""
    method = subject.method
    own = {id(p): p for p in method.parameters()}
    banks, others = _held(method, set(own))
    blocks = list(_blocks(subject.encoder))
    return Sizes(
        parameters=sum(p.numel() for p in own.values()),
        trainable=sum(p.numel() for p in own.values() if p.requires_grad),
        largest_block=max(blocks, default=0),
        block_count=len(blocks),
        frozen=sum(t.nbytes for t in others.values()),
        banks=sum(_bank_bytes(bank) for bank in banks),
        bank_row=sum(_bank_bytes(bank) // max(1, bank.spec.slots) for bank in banks),
    )


def trace(subject: Subject, batch: int, *, precision: str, checkpointing: bool = False) -> Traced:
    """Traces one micro-batch: forward, backward, bank update.

    Args:
        subject: from ``build_subject``; used up: its tensors become fake ones.
        batch: images.
        precision: ``fp32``; ``bf16``: autocast around fp32 parameters.
        checkpointing: recompute each block's activations in the backward.

    Raises:
        ConfigError: the architecture has no activation checkpointing.
    """
    method = subject.method
    if checkpointing:
        _checkpoint(subject.encoder)
    with FakeTensorMode(allow_non_fake_inputs=True), _quiet():
        method.to_empty(device="cpu")
        _unmeta(method)
        method.train()
        images = _batch(subject, batch)
        autocast = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
        method.before_step(MIDWAY)
        with _Ones(), closing(Ledger(method.parameters())) as ledger, ledger:
            banks, others = _held(method, set())
            rows = (tensor for bank in banks for tensor in _bank_tensors(bank))
            ledger.ignore([*method.parameters(), *method.buffers(), *others.values(), *rows])
            with autocast:
                output = method(images, MIDWAY)
            activations = ledger.live
            output.loss.backward()
        method.after_step([output], [images], MIDWAY)
    return Traced(
        batch=batch,
        activations=activations,
        peak=ledger.peak,
        peak_with_gradients=ledger.peak_with_gradients,
        flops=ledger.flops,
        moved=ledger.moved,
        operations=ledger.operations,
    )


def traced_step(
    config: RunConfig, num_classes: int, batch: int, *, precision: str, checkpointing: bool = False
) -> Traced:
    """``trace`` on the method of ``config``."""
    subject = build_subject(config, num_classes)
    return trace(subject, batch, precision=precision, checkpointing=checkpointing)


# ---------------------------------------------------------------- parts


def _resources(config: RunConfig, needs: Needs, encoder: Encoder, num_classes: int, size: int) -> Resources:
    source_head = None
    if needs.source_head:
        source_head = nn.Linear(encoder.feature_dim, int(encoder.pretrained_cfg.get("num_classes") or 1000))
    return Resources(
        classes=tuple(str(number) for number in range(num_classes)),
        text_features=torch.empty(num_classes, _TEXT_WIDTH) if needs.text_features else None,
        source_head=source_head,
        image_size=size,
        source_batch_size=_source_rows(config) if needs.source_stream else None,
    )


def _source_rows(config: RunConfig) -> int:
    parts: tuple[Settings, ...] = (
        config.method.parts if isinstance(config.method, CombinedSettings) else (config.method,)
    )
    soft = next((part for part in parts if isinstance(part, SoftFineTuningSettings)), None)
    return (soft.source_batch_size if soft is not None else None) or config.train.batch_size


class _Ones(TorchDispatchMode):
    """A number that a step reads (the seed of Core-tuning's draws) is 1: traced tensors have no content."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


def _batch(subject: Subject, rows: int) -> Batch:
    def images(count: int) -> Tensor:
        made = torch.empty(count, 3, subject.image_size, subject.image_size)
        return (
            made.contiguous(memory_format=torch.channels_last) if subject.config.train.channels_last else made
        )

    def labels(count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64)

    source = None
    if subject.needs.source_stream:
        count = _source_rows(subject.config)
        source = Batch(images(count), labels(count), labels(count))
    return Batch(
        images(rows),
        labels(rows),
        labels(rows),
        views=named_views([images(rows) for _ in subject.needs.views]),
        source=source,
    )


def _held(method: nn.Module, own: set[int]) -> tuple[list[FeatureBank], dict[int, Tensor]]:
    """Banks and tensors that a method keeps beside its parameters, wherever its attributes hold them."""
    banks: dict[int, FeatureBank] = {}
    tensors: dict[int, Tensor] = {}
    seen: set[int] = set()

    def walk(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            if id(value) not in own:
                tensors[id(value)] = value
        elif isinstance(value, FeatureBank):
            banks[id(value)] = value
        elif isinstance(value, nn.Module):
            walk(vars(value))
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                walk(inner)

    walk(method)
    return list(banks.values()), tensors


def _unmeta(method: nn.Module) -> None:
    """Constants that a method keeps in plain attributes; ``to_empty`` moves only parameters, buffers and copies."""
    for module in method.modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                continue
            made = _real(value)
            if made is not value:
                vars(module)[name] = made


def _real(value: Any) -> Any:
    if isinstance(value, Tensor) and value.device.type == "meta":
        return torch.empty_like(value, device="cpu")
    if isinstance(value, list | tuple) and any(
        isinstance(v, Tensor) and v.device.type == "meta" for v in value
    ):
        return type(value)(_real(v) for v in value)
    if isinstance(value, dict) and any(
        isinstance(v, Tensor) and v.device.type == "meta" for v in value.values()
    ):
        return {key: _real(v) for key, v in value.items()}
    return value


def _bank_tensors(bank: FeatureBank) -> list[Tensor]:
    view = bank.view()
    return [*view.fields.values(), view.labels, view.ids]


def _bank_bytes(bank: FeatureBank) -> int:
    return sum(tensor.nbytes for tensor in _bank_tensors(bank))


def _blocks(encoder: nn.Module) -> Iterator[int]:
    """Elements of the pieces that ZeRO-3 gathers: the members of each list of equal blocks, or the children."""
    model = getattr(encoder, "model", encoder)
    for child in model.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from (sum(p.numel() for p in block.parameters()) for block in child)
        else:
            yield sum(p.numel() for p in child.parameters())


def _checkpoint(encoder: Encoder) -> None:
    switch = getattr(encoder.model, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise AssertionError("timm's model has no such switch")
        switch(True)
    except AssertionError as err:
        raise ConfigError(f"{encoder.name} has no activation checkpointing ({err}): leave it off") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Methods log what they find at their set-up; a plan is not a run."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
