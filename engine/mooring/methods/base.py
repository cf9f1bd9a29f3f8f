"""The contract between a fine-tuning method and the engine that trains it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.data.batch import Batch
from mooring.distributed import ALONE, Ranks
from mooring.methods.classification import batch_cross_entropy, batch_metrics
from mooring.methods.forward import Forward
from mooring.models.batchnorm import FrozenEncoder, frozen_copy
from mooring.models.front_door import FrontDoorHead

# Nested dicts whose leaves are tensors, numbers, strings, booleans or None.
StateTree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a method asks the engine for."""

    views: tuple[str, ...] = ()  # augmentations of further views of each image: Batch.views["view1"], ...
    frozen_encoder: bool = False  # a second, untrained copy of the encoder
    warm_up: bool = False  # a pass over training images before the first step
    feature_map: bool = False  # Forward.feature_map
    mixing: bool = True  # mixup / cutmix are defined for this method
    batchnorm: Literal["train", "frozen"] | None = None  # what train.batchnorm=auto means; None: frozen
    text_features: bool = False  # Resources.text_features
    source_head: bool = False  # Resources.source_head: the classifier of the pretrained weights
    source_stream: bool = False  # Batch.source: images of the task the weights were trained for
    # the encoder may come in parts, after the set-up: the method neither copies, reads nor runs it before
    encoder_in_parts: bool = False


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
        warm_up: one pass over the training images with the training augmentation, on the device; each rank
            gets its share, in equally many batches. Drawing from it does not disturb the run's own batches.
        train_size: number of training images.
        batch_size: images per optimizer step on all ranks, accumulation included.
        total_steps, steps_per_epoch: optimizer steps.
        autocast: a context factory for the run's precision.
        seed: the run's seed, for generators of the method's own.
        head_lr: peak learning rate of the head as configured; None outside the engine.
        clean: one pass over the training images with the test-time preprocessing, in batches of the training's
            size and in random order; None: ``warm_up``.
        optimizer: its name, as configured; None outside the engine.
    """

    device: torch.device
    warm_up: Callable[[], Iterator[Batch]]
    train_size: int
    batch_size: int
    total_steps: int
    steps_per_epoch: int
    autocast: Callable[[], Any]
    seed: int = 0
    head_lr: float | None = None
    clean: Callable[[], Iterator[Batch]] | None = None
    optimizer: str | None = None

    def clean_images(self) -> Iterator[Batch]:
        """One pass over the training images as the test sees them; as ``warm_up`` where there is no such pass."""
        return (self.clean or self.warm_up)()


@dataclass(frozen=True, slots=True)
class Resources:
    """What a method may need beside encoder and head; the engine fills in what ``Needs`` asks for.

    Attributes:
        classes: class names by label.
        text_features: [C, d] float32 unit rows, one per class name.
        source_head: the classifier that the pretrained weights came with, D -> C_S.
        image_size: height = width of the training images in pixels.
        source_batch_size: rows of the source stream in a full batch, of all ranks together; None: the method's
            settings say it.
        ranks: those that train this method together.
    """

    classes: tuple[str, ...] = ()
    text_features: Tensor | None = None
    source_head: nn.Linear | None = None
    image_size: int | None = None
    source_batch_size: int | None = None
    ranks: Ranks = ALONE


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
    ``mooring.methods.registry``. Its loss is made of three parts, so that methods can run together
    (``mooring.methods.combined``) on one forward of the encoder:

        loss = widened(classification + sum of additions)

    ``classification`` is the mean loss of the batch rows, plain cross-entropy unless overridden; ``additions``
    are further terms about the batch or the weights; ``widened`` may extend the mean over more rows.

    Args:
        encoder: maps [B, 3, H, W] to pooled features [B, D]; trained in place.
        head: the classifier, maps [B, D] to logits [B, C]; ``head.weight`` is [C, D].
        settings: an instance of ``Config``.
        label_smoothing: share of each target spread evenly over the classes.
        resources: what the method needs beside these; None: nothing.
    """

    Config: ClassVar[type[BaseModel]]
    needs: ClassVar[Needs] = Needs()
    name: ClassVar[str]

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Linear,
        settings: BaseModel,
        *,
        label_smoothing: float = 0.0,
        resources: Resources | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.settings = settings
        self.label_smoothing = label_smoothing
        self.resources = resources or Resources()
        self.ranks = self.resources.ranks
        self.requirements = self.needs_of(settings)
        # In a tuple, so that it is no submodule: never wrapped, saved, trained or put in train mode.
        self._frozen: tuple[FrozenEncoder, ...] = ()
        self._digest: str | None = None

    @classmethod
    def needs_of(cls, settings: BaseModel) -> Needs:
        """What the method asks for under these settings."""
        return cls.needs

    # ---------------------------------------------------------------- networks

    @property
    def frozen_encoder(self) -> FrozenEncoder:
        """The untrained copy of the encoder, taken by ``keep_frozen_copy``."""
        return self._frozen[0]

    def keep_frozen_copy(self, *, fold: bool = True) -> None:
        """Takes the frozen copy from the encoder as it is now. Call it in ``__init__``, before any training.

        Args:
            fold: fold BatchNorm into the convolutions before it; False where their outputs are compared.
        """
        self._frozen = (frozen_copy(self.encoder, fold=fold),)

    def share_frozen_copy(self, frozen: FrozenEncoder) -> None:
        """Uses a frozen copy that another method keeps."""
        self._frozen = (frozen,)

    def own_source_head(self) -> nn.Linear:
        """A copy of the pretrained classifier, for the method to keep.

        Raises:
            ValueError: there is none; the engine provides it where ``needs.source_head``.
        """
        source = self.resources.source_head
        if source is None or source.in_features != self.head.in_features:
            raise ValueError(
                f"{self.name} needs resources.source_head, a Linear from {self.head.in_features} features to the "
                f"classes of the pretrained weights; got {source}"
            )
        return copy.deepcopy(source)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for frozen in self._frozen:
            frozen._apply(fn)  # follows .to(device), though it is no submodule
        return self

    def followers(self) -> Sequence[nn.Module]:
        """Networks beside the trained ones whose BatchNorm may use batch statistics."""
        return ()

    def recorded_modules(self) -> Sequence[str]:
        """Modules inside the encoder whose outputs ``Forward.recorded`` must hold."""
        return ()

    # ---------------------------------------------------------------- a run

    def setup(self, context: SetupContext) -> None:
        """Called once per run, before the first step; never after a resume."""

    def before_step(self, at: At) -> None:
        """Called before the forwards of an optimizer step."""

    def forward(self, batch: Batch, at: At) -> StepOutput:
        run = Forward(
            self,
            batch,
            wants_map=self.requirements.feature_map,
            with_source=self.source_alongside(batch, at),
        )
        additions = self.additions(run, at)
        loss = self.widened(sum(additions.values(), self.classification(run, at)), run, at)
        metrics = batch_metrics(loss, run.logits, run.targets)
        metrics |= {f"loss_{name}": term.detach().float() for name, term in additions.items()}
        return StepOutput(loss, run.logits, metrics, self.pushed(run))

    def classification(self, run: Forward, at: At) -> Tensor:
        """Mean loss over the valid rows of the batch, ``over_ranks``, fp32 scalar; called after ``additions``."""
        if run.cross_entropy is not None:
            return run.over_ranks(run.cross_entropy)
        return run.over_ranks(batch_cross_entropy(run.logits, run.targets, self.label_smoothing))

    def additions(self, run: Forward, at: At) -> dict[str, Tensor]:
        """Further fp32 terms of the loss, weights included, by the name they are logged under.

        The gradient of a step is the mean over ranks: a mean over the rows of a batch goes through ``run.over_ranks``;
        what only the rows of all ranks together define reads them through ``mooring.collectives``.
        """
        return {}

    def widened(self, loss: Tensor, run: Forward, at: At) -> Tensor:
        """The loss of the batch rows, extended over further rows."""
        return loss

    def pushed(self, run: Forward) -> Mapping[str, Tensor]:
        """Rows to enqueue after the step, name -> [B, ...], detached."""
        return {}

    def forward_state(self) -> tuple[list[Tensor], list[torch.Generator]]:
        """What ``before_step`` and forwards change in place: tensors, and generators of the method's own.

        A step that is not taken (its gradient is not finite) is undone by putting these back.
        """
        return list(self.buffers()), []

    def after_step(self, outputs: list[StepOutput], batches: list[Batch], at: At) -> None:
        """Called once per optimizer step with the outputs of its micro-batches, in order."""

    def source_rows(self, at: At) -> int:
        """Rows of the source stream that all ranks together read in this step, where ``needs.source_stream``; a
        function of ``at`` alone. Each rank gets an equal share, rounded up."""
        return 0

    def source_alongside(self, batch: Batch, at: At) -> bool:
        """Whether the source images go through the encoder as one batch with the target's."""
        return False

    def joined(self, partners: frozenset[str]) -> None:
        """Called once where the method runs beside others, by their names.

        Raises:
            ConfigError: its settings do not allow it.
        """

    # ---------------------------------------------------------------- optimizer

    def parameter_roles(self) -> Mapping[str, list[nn.Parameter]]:
        """Trainable parameters by role: ``backbone``, ``head``, ``auxiliary``."""
        return {
            "backbone": [
                p for p in (*self.encoder.parameters(), *self.pretrained_parameters()) if p.requires_grad
            ],
            "head": [p for p in self.head.parameters() if p.requires_grad],
            "auxiliary": self.auxiliary_parameters(),
        }

    def pretrained_parameters(self) -> list[nn.Parameter]:
        """Parameters beside the encoder's that start pretrained, and learn at the backbone's rate."""
        return []

    def auxiliary_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that are neither pretrained nor the head's."""
        owned = {id(p) for module in (self.encoder, self.head) for p in module.parameters()}
        owned |= {id(p) for p in self.pretrained_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in owned]

    def head_lr_multiplier(self, batch_size: int, optimizer: str) -> float:
        """Head learning rate over backbone learning rate where the user set none."""
        return 5.0

    def lr_factors(self, at: At) -> Mapping[str, float]:
        """Factor on the scheduled learning rate by role, for methods with phases; 1 where none is given."""
        return {}

    # ---------------------------------------------------------------- inference and state

    def predict(self, images: Tensor) -> Tensor:
        """Inference logits [B, C] for normalised images [B, 3, H, W]."""
        return self.head(self.encoder(images))

    def prediction_choices(self) -> tuple[str, ...]:
        """Ways to predict among which the validation split decides; none where there is only one."""
        return ()

    def choose_prediction(self, choice: str) -> None:
        """Makes ``predict`` use one of ``prediction_choices``; kept in a buffer, so beside the weights."""
        raise ValueError(f"{self.name} predicts in one way only; got {choice!r}")

    def extra_state(self) -> StateTree:
        """What is neither parameter nor buffer: banks, rotation, counters; of a frozen encoder, what tells it apart."""
        return {"frozen_encoder": self._frozen_digest()} if self._frozen else {}

    def resharded_state(self, states: Sequence[StateTree]) -> StateTree:
        """This rank's ``extra_state`` where another number of ranks saved theirs, for ``load_extra_state``.

        By default rank 0's: what the ranks keep is the same on each (anchors, counters, streams that all draw from
        alike). A method with banks or statistics of its own brings those of all ranks together.

        Args:
            states: by rank; what is not looked at is not read.
        """
        return states[0]

    def load_extra_state(self, state: StateTree) -> None:
        """Restores what ``extra_state`` returned, bit for bit.

        Raises:
            ValueError: the run would not go on as it began.
        """
        if self._frozen and state.get("frozen_encoder") != self._frozen_digest():
            raise ValueError(
                "the pretrained weights differ from those the run was started with, and the frozen encoder is made "
                "from them; restore the weights file, or start a new run"
            )

    def _frozen_digest(self) -> str:
        """sha256 over the frozen encoder's weights, computed once: it never changes."""
        if self._digest is None:
            total = hashlib.sha256()
            for name, tensor in self.frozen_encoder.state_dict().items():
                total.update(name.encode())
                total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            self._digest = total.hexdigest()
        return self._digest

    def exported(self) -> tuple[nn.Module, nn.Linear]:
        """Encoder and head for inference, without auxiliary parts."""
        return self.encoder, self.head

    def exported_front_door(self) -> tuple[FrontDoorHead, str] | None:
        """A second head that inference needs beside ``exported``, and how the two are joined; None: there is none."""
        return None
