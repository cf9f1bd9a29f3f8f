"""The contract between a fine-tuning method and the engine that trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.data.batch import Batch

# Nested dicts whose leaves are tensors, numbers, strings, booleans or None.
StateTree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a method asks the engine for, declared on the class."""

    views: int = 0  # extra augmented views per image
    frozen_encoder: bool = False  # a second, untrained copy of the encoder
    warm_up: bool = False  # a pass over training images before the first step
    mixing: bool = True  # mixup / cutmix are defined for this method


@dataclass(frozen=True, slots=True)
class At:
    """Where in the run a call happens. Branch on this only, so that all ranks take the same branch."""

    step: int  # global optimizer step, from 0
    epoch: int
    steps_per_epoch: int
    total_steps: int
    micro: int = 0  # index inside the accumulation group
    micros: int = 1  # size of the accumulation group

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return self.step / max(1, self.total_steps)


@dataclass(frozen=True, slots=True)
class SetupContext:
    """What a method may use once, before the first step of a fresh run.

    Attributes:
        device: where batches will lie.
        warm_up: one pass over the training images with the training augmentation, on the device;
            drawing from it does not disturb the run's own batches.
        train_size: number of training images.
        batch_size: images per optimizer step on this rank, accumulation included.
        total_steps, steps_per_epoch: optimizer steps.
        autocast: a context factory for the run's precision.
        seed: the run's seed, for generators of the method's own.
    """

    device: torch.device
    warm_up: Callable[[], Iterator[Batch]]
    train_size: int
    batch_size: int
    total_steps: int
    steps_per_epoch: int
    autocast: Callable[[], Any]
    seed: int = 0


@dataclass(slots=True)
class StepOutput:
    """What one forward of a method returns.

    Attributes:
        loss: fp32 scalar with graph; the quantity whose gradient is taken.
        logits: [B, C] of the batch rows.
        metrics: detached device scalars (never Python floats: no host sync inside a step).
        push: rows to enqueue after the optimizer step, name -> [B, ...].
    """

    loss: Tensor
    logits: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    push: Mapping[str, Tensor] = field(default_factory=dict)


class Method(nn.Module):
    """A fine-tuning method: the trainable modules and the loss. Owns no loop, optimizer or logger.

    A subclass sets ``Config`` (its settings), ``needs`` and ``name``, and is found by name through
    ``mooring.methods.registry``.

    Args:
        encoder: maps [B, 3, H, W] to pooled features [B, D]; trained in place.
        head: the classifier, maps [B, D] to logits [B, C]; ``head.weight`` is [C, D].
        settings: an instance of ``Config``.
        label_smoothing: share of each target spread evenly over the classes.
    """

    Config: ClassVar[type[BaseModel]]
    needs: ClassVar[Needs] = Needs()
    name: ClassVar[str]

    def __init__(
        self, encoder: nn.Module, head: nn.Linear, settings: BaseModel, *, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.settings = settings
        self.label_smoothing = label_smoothing

    @staticmethod
    def targets(batch: Batch) -> Tensor:
        """Soft targets [B, C] where images were mixed, else labels [B]."""
        return batch.labels if batch.targets is None else batch.targets

    def setup(self, context: SetupContext) -> None:
        """Called once per run, before the first step; never after a resume."""

    def forward(self, batch: Batch, at: At) -> StepOutput:
        raise NotImplementedError

    def before_step(self, at: At) -> None:
        """Called before the forwards of an optimizer step."""

    def after_step(self, outputs: list[StepOutput], batches: list[Batch], at: At) -> None:
        """Called once per optimizer step with the outputs of its micro-batches, in order."""

    def parameter_roles(self) -> Mapping[str, list[nn.Parameter]]:
        """Trainable parameters by role: ``backbone``, ``head``, ``auxiliary``."""
        return {
            "backbone": [p for p in self.encoder.parameters() if p.requires_grad],
            "head": [p for p in self.head.parameters() if p.requires_grad],
            "auxiliary": [],
        }

    def head_lr_multiplier(self, batch_size: int, optimizer: str) -> float:
        """Head learning rate over backbone learning rate where the user set none."""
        return 5.0

    def lr_factors(self, at: At) -> Mapping[str, float]:
        """Factor on the scheduled learning rate by role, for methods with phases; 1 where none is given."""
        return {}

    def predict(self, images: Tensor) -> Tensor:
        """Inference logits [B, C] for normalised images [B, 3, H, W]."""
        return self.head(self.encoder(images))

    def extra_state(self) -> StateTree:
        """What is neither parameter nor buffer: banks, rotation, counters."""
        return {}

    def load_extra_state(self, state: StateTree) -> None:
        """Restores what ``extra_state`` returned, bit for bit."""

    def exported(self) -> tuple[nn.Module, nn.Linear]:
        """Encoder and head for inference, without auxiliary parts."""
        return self.encoder, self.head
