"""Small encoders and batches on which every method is tried."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from mooring.config.baseline_settings import (
    BSSSettings,
    CoTuningSettings,
    DELTASettings,
    FeatureDistillationSettings,
    FeatureMapSettings,
    L2SPSettings,
    LwFSettings,
    StochNormSettings,
)
from mooring.config.concept_settings import ConceptTuningSettings
from mooring.config.contrast_settings import BiTuningSettings, CoreTuningSettings
from mooring.config.daft_settings import DAFTSettings
from mooring.config.method_settings import (
    DRTuneSettings,
    FineTuneSettings,
    LinearProbeSettings,
    LPFTSettings,
    Settings,
)
from mooring.config.soft_settings import SoftFineTuningSettings
from mooring.config.tes_settings import TeSSettings
from mooring.data.batch import Batch, named_views
from mooring.distributed import ALONE, Ranks
from mooring.methods.base import At, Method, Resources, SetupContext
from mooring.methods.registry import build_method
from mooring.models.head import build_head
from mooring.models.torchvision_shim import import_torchvision

# One settings table: every method of the registry must stand here (a test compares the two).
SETTINGS: dict[str, Settings] = {
    "fine_tune": FineTuneSettings(),
    "linear_probe": LinearProbeSettings(),
    "lp_ft": LPFTSettings(),
    "dr_tune": DRTuneSettings(bank_size=24, rotation_period=2),
    "l2_sp": L2SPSettings(),
    "feature_map": FeatureMapSettings(map_pull=1e-4),
    "delta": DELTASettings(map_pull=1e-4),
    "bss": BSSSettings(),
    "stoch_norm": StochNormSettings(),
    "lwf": LwFSettings(),
    "feature_distillation": FeatureDistillationSettings(feature_pull=1e-3, regressor="linear"),
    "co_tuning": CoTuningSettings(),
    "bi_tuning": BiTuningSettings(image_contrast=0.1, class_contrast=0.1, queue_rows=4),
    "core_tuning": CoreTuningSettings(),
    "concept_tuning": ConceptTuningSettings(
        image_contrast=0.1,
        concept_contrast=0.1,
        contrast_warm_up=0.0,  # every term from the first step on
        queue_rows=4,
        bottleneck=32,
        transport_rounds=5,
        predict="cls",  # the other heads are no part of the exported timm model: test_method_concept
    ),
    "tes": TeSSettings(projection_width=32),
    "soft_fine_tuning": SoftFineTuningSettings(source_batch_size=8),
    "daft": DAFTSettings(),
}
SOURCE_CLASSES = 6


def small_encoder(kind: str) -> nn.Module:
    import_torchvision()
    import timm

    torch.manual_seed(0)
    if kind == "cnn":
        return timm.create_model("resnet10t", num_classes=0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)


def make_batch(rows: int, classes: int, seed: int = 0, *, padded: int = 0) -> Batch:
    """Images that carry their label in their mean colour, so that a loss can fall; ``padded`` rows at the end.

    Beside them lie 8 images of the source task, and three further views.
    """
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=g)
    images = torch.randn(rows, 3, 32, 32, generator=g) * 0.3
    images += torch.linspace(-1.5, 1.5, classes)[labels][:, None, None, None]
    ids = torch.arange(rows) + 1000 * seed
    if padded:
        labels[-padded:] = -1
        ids[-padded:] = -1
    images = images.contiguous(memory_format=torch.channels_last)
    return Batch(images, labels, ids, source=make_source_rows(8, seed), views=make_views(images, seed))


def make_views(images: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Three further views of the images: noise of another draw on top."""
    g = torch.Generator().manual_seed(2000 + seed)
    noise = torch.randn(3, *images.shape, generator=g) * 0.1
    return named_views([(images + each).contiguous(memory_format=torch.channels_last) for each in noise])


def make_source_rows(rows: int, seed: int = 0) -> Batch:
    """Images of the task that the weights were trained for; brighter in one corner, by class."""
    g = torch.Generator().manual_seed(1000 + seed)
    labels = torch.randint(0, SOURCE_CLASSES, (rows,), generator=g)
    images = torch.randn(rows, 3, 32, 32, generator=g) * 0.3
    images[:, :, :16, :16] += torch.linspace(-2, 2, SOURCE_CLASSES)[labels][:, None, None, None]
    return Batch(images.contiguous(memory_format=torch.channels_last), labels, torch.arange(rows))


def context(batches: list[Batch], *, steps: int = 20) -> SetupContext:
    def warm_up() -> Iterator[Batch]:
        yield from batches

    return SetupContext(
        device=torch.device("cpu"),
        warm_up=warm_up,
        train_size=sum(b.labels.shape[0] for b in batches),
        batch_size=batches[0].labels.shape[0],
        total_steps=steps,
        steps_per_epoch=steps,
        autocast=contextlib.nullcontext,
    )


def at(step: int, *, steps: int = 20, micro: int = 0, micros: int = 1) -> At:
    return At(step=step, epoch=0, steps_per_epoch=steps, total_steps=steps, micro=micro, micros=micros)


def make_method(
    name: str, kind: str = "cnn", classes: int = 4, *, ranks: Ranks = ALONE, **changes: object
) -> Method:
    encoder = small_encoder(kind)
    torch.manual_seed(1)
    head = build_head(encoder.num_features, classes)
    resources = Resources(
        classes=tuple(f"class {i}" for i in range(classes)),
        text_features=torch.randn(classes, 12, generator=torch.Generator().manual_seed(5)),
        source_head=build_head(encoder.num_features, SOURCE_CLASSES, std=0.1),
        image_size=32,
        ranks=ranks,
    )
    return build_method(SETTINGS[name].model_copy(update=changes), encoder, head, resources=resources)


def train_step(method: Method, batches: list[Batch], optimizer: torch.optim.Optimizer, where: At) -> float:
    """What the engine does in a step, without the engine."""
    method.train()
    method.before_step(where)
    outputs = []
    for micro, batch in enumerate(batches):
        spot = at(where.step, steps=where.total_steps, micro=micro, micros=len(batches))
        out = method(batch, spot)
        (out.loss / len(batches)).backward()
        outputs.append(out)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    method.after_step(outputs, batches, where)
    return float(sum(o.loss.detach() for o in outputs)) / len(batches)


def trained_parameters(method: Method) -> list[nn.Parameter]:
    return [p for role in method.parameter_roles().values() for p in role]


def selected(batch: Batch, rows: Tensor | slice) -> Batch:
    """These rows of a batch, of its further views too."""
    views = {name: view[rows] for name, view in batch.views.items()}
    return replace(
        batch, images=batch.images[rows], labels=batch.labels[rows], ids=batch.ids[rows], views=views
    )
