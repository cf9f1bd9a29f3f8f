"""From a configuration to the parts of a run. Everything that can be wrong is found here, before any training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from mooring.config.daft_settings import DAFTSettings
from mooring.config.method_settings import CombinedSettings, method_title
from mooring.config.schema import RunConfig
from mooring.config.settings import Settings
from mooring.config.soft_settings import SoftFineTuningSettings
from mooring.config.tes_settings import TeSSettings
from mooring.data.augment import ModelInput, evaluation, mild, preset
from mooring.data.cache import open_manifest
from mooring.data.class_names import readable_names
from mooring.data.class_split import seen_and_unseen
from mooring.data.manifest import Manifest, Split
from mooring.data.row_stream import RowStream
from mooring.data.source import EpochSource
from mooring.data.source_task import source_split
from mooring.data.sources import make_source
from mooring.data.subset import training_subset
from mooring.data.text_features import class_text_features, too_alike
from mooring.distributed import ALONE, Ranks
from mooring.errors import ConfigError, DataError
from mooring.methods.base import Method, Needs, Resources
from mooring.methods.registry import build_method, needs_of
from mooring.methods.without_effect import check_effect
from mooring.models.batchnorm import FrozenEncoder, freeze_statistics, frozen_copy, parameter_count
from mooring.models.batchnorm_sync import synchronise_statistics_
from mooring.models.ema import WeightEMA
from mooring.models.encoder import Encoder, encoder_of
from mooring.models.export import assemble as assemble_export
from mooring.models.export import check_assembly
from mooring.models.groups import parameter_groups
from mooring.models.head import build_head
from mooring.models.pretrained_head import pretrained_head
from mooring.models.weights import cache_folder
from mooring.train.backend import Backend, make_backend
from mooring.train.extra_tests import open_extra_tests
from mooring.train.held_out import HeldOut, open_held_out
from mooring.train.inputs import images_of, tensors_digest, weights_digest
from mooring.train.optimizers import build_optimizer, default_lr
from mooring.train.precision import choose_device, choose_precision
from mooring.train.results import RunPlan
from mooring.train.schedules import Schedule
from mooring.train.sharded_loading import loads_in_parts

_log = logging.getLogger(__name__)
_Table = TypeVar("_Table", bound=Settings)

# The warm-up pass must not replay the batches of the run's first epoch: another order, other augmentations.
_WARM_UP_SEED = 0x5EED
# Source and target images are two independent streams.
_SOURCE_SEED = 0x50F7


@dataclass(slots=True)
class Parts:
    """The parts of one run, built and connected."""

    config: RunConfig
    manifest: Manifest
    inputs: dict[str, str]  # digest of what is read beside the images, by setting
    method: Method
    backend: Backend
    optimizer: Optimizer
    schedule: Schedule
    ema: WeightEMA | None
    train_source: EpochSource
    val_source: EpochSource
    test_source: EpochSource | None
    extra_test_sources: dict[str, EpochSource]
    source_stream: RowStream | None
    held_out: HeldOut | None
    in_parts: bool
    warm_up_source: Callable[[], EpochSource]
    clean_source: Callable[[], EpochSource]
    pretrained: FrozenEncoder | None
    eval_size: int
    precision: str
    lr: float
    head_lr: float
    steps_per_epoch: int

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes

    @property
    def num_classes(self) -> int:
        return len(self.manifest.classes)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.config.train.epochs

    @property
    def train_images(self) -> int:
        return self.manifest.counts["train"]

    def plan(self) -> RunPlan:
        counts = self.manifest.counts
        return RunPlan(
            train_images=counts["train"],
            val_images=counts["val"],
            test_images=counts.get("test", 0),
            classes=self.num_classes,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            feature_dim=self.method.head.in_features,
            parameters=parameter_count(self.method),
            trainable_parameters=parameter_count(self.method, trainable_only=True),
            model=self.config.model.name,
            method=method_title(self.config.method),
            device=str(self.backend.device),
            precision=self.precision,
            source=self.train_source.kind,
            lr=self.lr,
            head_lr=self.head_lr,
        )


def assemble(
    config: RunConfig,
    *,
    scan_progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> Parts:
    """Builds every part of the run that ``config`` describes.

    Args:
        config: checked settings.
        ranks: the processes of the run; None: this one alone.
        scan_progress: called with (done, total) files where the data has to be scanned first.

    Raises:
        MooringError: settings, data or weights cannot be used; says what to do.
    """
    ranks = ranks or Ranks()
    needs = needs_of(config.method)
    _check_mixing(config, needs)
    for note in check_effect(config):
        _log.warning("%s", note)
    device = choose_device(config.train.device)
    precision = choose_precision(config.train.precision, device)
    backend = make_backend(config, device, precision, ranks)
    manifest = everything = ranks.node_by_node(lambda: open_data(config, scan_progress))
    _check_same_data(manifest, ranks)
    unseen: Manifest | None = None
    if config.data.classes is not None or config.data.unseen_classes is not None:
        manifest, unseen = seen_and_unseen(
            manifest, classes=config.data.classes, unseen=config.data.unseen_classes, seed=config.seed
        )
    if config.data.shots is not None or config.data.fraction is not None:
        manifest = training_subset(
            manifest, shots=config.data.shots, fraction=config.data.fraction, seed=config.seed
        )
    extra_tests = open_extra_tests(config.data, manifest.classes, scan_progress)
    config = _fitting_batch(config, manifest.counts["train"], ranks.world)
    train = config.train
    share = train.batch_size // ranks.world
    in_parts = loads_in_parts(config, needs, device, ranks)
    encoder = encoder_of(config, deferred=in_parts)
    inputs = {"model.weights": ranks.on_first(lambda: weights_digest(config, encoder))}
    encoder.to(device)
    # before the method touches it; a continued run gets it from the same weights
    pretrained = frozen_copy(encoder, fold=False) if config.report.distortion else None
    head = build_head(
        encoder.feature_dim, len(manifest.classes), std=getattr(config.method, "head_init_std", 0.01)
    )
    # an architecture that cannot be exported is refused now, not at the end
    (check_assembly if in_parts else assemble_export)(encoder, head)
    if train.channels_last:
        _to_channels_last(encoder)
    resources = replace(_resources(config, needs, manifest, encoder), ranks=ranks)
    if resources.text_features is not None:
        inputs["method.text"] = tensors_digest({"text": resources.text_features})
    source_images = _source_images(config, needs, everything, resources)
    if source_images is not None:
        rows = _source_batch(config, len(source_images), ranks.world)
        resources = replace(resources, source_batch_size=rows)
    method = build_method(
        config.method, encoder, head, label_smoothing=train.label_smoothing, resources=resources
    ).to(device)
    if (needs.batchnorm or "frozen" if train.batchnorm == "auto" else train.batchnorm) == "frozen":
        freeze_statistics(encoder)
    if train.sync_batchnorm and ranks.world > 1:
        for module in (method, *method.followers()):
            synchronise_statistics_(module, ranks)
    if config.backend.activation_checkpointing:
        _checkpoint_activations(encoder)
    if train.compile:
        encoder.compile()  # in place: names of parameters stay

    train_size, eval_size = image_sizes(config, encoder)
    model_input = ModelInput.from_model_config(encoder.data_config, size=train_size)
    training = preset(config.data.augment, model_input)
    views = [{"train": training, "mild": mild(model_input)}[view] for view in needs.views]
    testing = evaluation(ModelInput.from_model_config(encoder.data_config, size=eval_size))

    def source(
        split: str | Split, *, is_training: bool, seed: int = config.seed, among: Ranks = ranks
    ) -> EpochSource:
        rows = manifest.split(split) if isinstance(split, str) else split
        return make_source(
            config.data.source,
            rows,
            training if is_training else testing,
            batch_size=share if is_training else _eval_batch(config, len(rows), among.world),
            training=is_training,
            seed=seed,
            rank=among.rank,
            world=among.world,
            workers=config.data.workers,
            views=views if is_training else (),
            device=device,
        )

    def warm_up_source() -> EpochSource:
        return source("train", is_training=True, seed=config.seed ^ _WARM_UP_SEED)

    def source_stream(images: Split) -> RowStream:
        batch = resources.source_batch_size
        assert batch is not None
        return RowStream(
            make_source(
                config.data.source,
                images,
                training,
                batch_size=batch // ranks.world,
                training=True,
                seed=config.seed ^ _SOURCE_SEED,
                rank=ranks.rank,
                world=ranks.world,
                interleaved=True,
                workers=config.data.workers,
                device=device,
            )
        )

    def clean_source() -> EpochSource:
        # shuffled: a batch of one class has other statistics than the batches of the training
        return make_source(
            config.data.source,
            manifest.split("train"),
            testing,
            batch_size=share,
            training=True,
            seed=config.seed ^ _WARM_UP_SEED,
            rank=ranks.rank,
            world=ranks.world,
            workers=config.data.workers,
            device=device,
            drop_last=False,
        )

    held_out = None
    if config.report.discrimination:
        held_out = open_held_out(
            config,
            everything,
            unseen,
            method,
            opened=lambda path: open_data(config, path=path),
            # neighbours are looked for among all images: every rank has all of them
            tested=lambda rows: source(rows, is_training=False, among=ALONE),
            progress=scan_progress,
        )
    train_source = source("train", is_training=True)
    lr = config.optimizer.lr or default_lr(config.optimizer.name)
    multiplier = _head_lr_multiplier(config, method, lr)
    groups = parameter_groups(
        method,
        method.parameter_roles(),
        lr=lr,
        head_lr_multiplier=multiplier,
        weight_decay=config.optimizer.weight_decay,
        layer_decay=config.optimizer.layer_decay,
        decay_norm_and_bias=config.optimizer.decay_norm_and_bias,
    )
    optimizer = build_optimizer(groups, config.optimizer, device)
    steps_per_epoch = math.ceil(len(train_source) / train.accumulate)
    return Parts(
        config=config,
        manifest=manifest,
        inputs=inputs | images_of(source_images, held_out, extra_tests),
        method=method,
        backend=backend,
        optimizer=optimizer,
        schedule=Schedule(optimizer, config.schedule, steps_per_epoch * train.epochs, steps_per_epoch),
        ema=None if train.ema_decay is None else WeightEMA(method, train.ema_decay),
        train_source=train_source,
        val_source=source("val", is_training=False),
        test_source=source("test", is_training=False) if "test" in manifest.counts else None,
        extra_test_sources={name: source(rows, is_training=False) for name, rows in extra_tests.items()},
        source_stream=None if source_images is None else source_stream(source_images),
        held_out=held_out,
        in_parts=in_parts,
        warm_up_source=warm_up_source,
        clean_source=clean_source,
        pretrained=pretrained,
        eval_size=eval_size,
        precision=precision,
        lr=lr,
        head_lr=lr * multiplier,
        steps_per_epoch=steps_per_epoch,
    )


def _parts_of(method: Settings) -> Sequence[Settings]:
    return method.parts if isinstance(method, CombinedSettings) else (method,)


def _head_lr_multiplier(config: RunConfig, method: Method, lr: float) -> float:
    """Head learning rate over backbone learning rate.

    Raises:
        ConfigError: two settings decide it.
    """
    optimizer = config.optimizer
    given = next((part.head_lr for part in _parts_of(config.method) if isinstance(part, DAFTSettings)), None)
    decides = isinstance(given, float) or (given == "auto" and optimizer.name == "sgd")
    if decides and optimizer.head_lr_multiplier is not None:
        raise ConfigError(
            f"method.head_lr={given} is the head's rate itself: leave out optimizer.head_lr_multiplier="
            f"{optimizer.head_lr_multiplier}, or set method.head_lr=none"
        )
    if isinstance(given, float):
        return given / lr
    return optimizer.head_lr_multiplier or method.head_lr_multiplier(
        config.train.batch_size * config.train.accumulate, optimizer.name
    )


def _resources(config: RunConfig, needs: Needs, manifest: Manifest, encoder: Encoder) -> Resources:
    """What the method needs beside encoder and head.

    Raises:
        MooringError: it is not to be had; says how to get it.
    """
    source_head = text_features = None
    if needs.text_features:
        text_features = _text_features(config.method, manifest.classes)
    if needs.source_head:
        with torch.random.fork_rng(devices=[]):  # the run's random numbers do not depend on the method
            source_head = pretrained_head(
                config.model.name, encoder.feature_dim, weights=config.model.weights
            )
    return Resources(
        classes=manifest.classes,
        text_features=text_features,
        source_head=source_head,
        image_size=config.train.image_size or int(encoder.data_config["input_size"][-1]),
    )


def _part(method: Settings, table: type[_Table]) -> _Table:
    """The settings of the one method, or of that part of several, which this table belongs to."""
    return next(part for part in _parts_of(method) if isinstance(part, table))


def _source_images(config: RunConfig, needs: Needs, manifest: Manifest, resources: Resources) -> Split | None:
    """Images of the task that the weights were trained for, without those of the target task.

    Raises:
        MooringError: there are none, or their classes are not the source head's.
    """
    if not needs.source_stream:
        return None
    settings = _part(config.method, SoftFineTuningSettings)
    assert resources.source_head is not None  # who needs the stream needs the head
    if settings.source_data is None:
        raise ConfigError(
            "soft_fine_tuning needs images of the task that the weights were trained for: give "
            "method.source_data=FOLDER (and method.source_classes=FILE), or take method.source=distill"
        )
    target = {str(digest) for digest in manifest.table["sha256"].to_pylist()}
    images = source_split(
        open_data(config, path=settings.source_data),
        resources.source_head.out_features,
        classes_file=settings.source_classes,
        without=target,
        images=settings.source_images,
        seed=config.seed,
    )
    if settings.source_batch_size is not None and settings.source_batch_size > len(images):
        raise DataError(
            f"method.source_data holds {len(images)} training images, fewer than method.source_batch_size="
            f"{settings.source_batch_size}: lower it"
        )
    return images


def _source_batch(config: RunConfig, images: int, world: int) -> int:
    """B_S: as set, else the target's batch, as far as there are images.

    Raises:
        ConfigError: the ranks cannot share what was set.
    """
    settings = _part(config.method, SoftFineTuningSettings)
    given = settings.source_batch_size
    if given is not None and given % world:
        raise ConfigError(_unshared("method.source_batch_size", given, world))
    return given or max(world, min(config.train.batch_size, images) // world * world)


def _text_features(method: Settings, classes: Sequence[str]) -> Tensor:
    """Vectors of the class names, from the text encoder that the method's settings name."""
    settings = _part(method, TeSSettings)
    names = readable_names(classes, settings.class_names)
    features = class_text_features(settings.text, classes, names, settings.templates, cache_folder() / "text")
    for first, second in too_alike(features, names):
        _log.warning("the text cannot tell %r from %r: their vectors are equal", first, second)
    return features


def open_data(
    config: RunConfig, progress: Callable[[int, int], None] | None = None, path: Path | None = None
) -> Manifest:
    """The manifest of ``path`` (default: the run's own data), scanned on first use and cached after that."""
    data = config.data
    return open_manifest(
        path or data.path,
        cache_folder() / "manifests",
        val_fraction=data.val_fraction,
        seed=config.seed,
        workers=data.workers,
        max_pixels=data.max_pixels,
        image_column=data.image_column,
        label_column=data.label_column,
        split_column=data.split_column,
        progress=progress,
    )


def image_sizes(config: RunConfig, encoder: Encoder) -> tuple[int, int]:
    """Training and evaluation resolution in pixels.

    Raises:
        ConfigError: two resolutions for a model that takes one.
    """
    own = int(encoder.data_config["input_size"][-1])
    train, test = config.train.image_size or own, config.train.eval_size or own
    if encoder.fixed_input_size and train != test:
        raise ConfigError(
            f"{config.model.name} takes images of one size: got train.image_size={train} and train.eval_size={test}; "
            "give both the same value"
        )
    return train, test


def _to_channels_last(encoder: torch.nn.Module) -> None:
    # parameter by parameter: Module.to(memory_format=...) has no typed overload
    for parameter in encoder.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _eval_batch(config: RunConfig, images: int, world: int) -> int:
    """Evaluation keeps no graph, so twice the training batch fits; a small split needs no padding beyond itself."""
    return math.ceil(min(2 * config.train.batch_size, images) / world)


def _fitting_batch(config: RunConfig, images: int, world: int) -> RunConfig:
    """The default batch where the data set is smaller, or where the ranks cannot share it; a batch size that the
    user set is never changed.

    Raises:
        ConfigError: the ranks cannot share what was set.
    """
    train = config.train
    if "batch_size" in train.model_fields_set:
        if train.batch_size % world:
            raise ConfigError(_unshared("train.batch_size", train.batch_size, world))
        return config
    size = max(world, min(images, train.batch_size) // world * world)
    if size == train.batch_size:
        return config
    return config.model_copy(update={"train": train.model_copy(update={"batch_size": size})})


def _unshared(name: str, size: int, world: int) -> str:
    return (
        f"{name} counts the images of all processes and must be a multiple of their number; got {size} for {world} "
        f"processes: take {max(1, round(size / world)) * world}"
    )


def _check_same_data(manifest: Manifest, ranks: Ranks) -> None:
    """
    Raises:
        DataError: two ranks see other images.
    """
    digests = ranks.gather(manifest.digest)
    other = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if other:
        raise DataError(
            f"every process must see the same images; the manifest of rank 0 is {digests[0][:12]}, that of rank "
            f"{other[0]} is {digests[other[0]][:12]}: give all nodes the same data, or one manifest folder"
        )


def _checkpoint_activations(encoder: Encoder) -> None:
    """
    Raises:
        ConfigError: timm has no checkpointing for this architecture.
    """
    try:
        encoder.model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise ConfigError(
            f"backend.activation_checkpointing: timm has none for {encoder.architecture}; set it to false"
        ) from None


def _check_mixing(config: RunConfig, needs: Needs) -> None:
    if needs.mixing or not (config.train.mixup or config.train.cutmix):
        return
    raise ConfigError(
        f"method.name={method_title(config.method)} does not define mixup or cutmix (it needs one label a row): "
        "set train.mixup=0 and train.cutmix=0, or take another method"
    )
