"""What a traced step says, against arithmetic and against real allocations of the same step."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from mooring.capacity.step import MIDWAY, Subject, build_subject, sizes, trace, traced_step
from mooring.capacity.storages import Ledger
from mooring.config.keys import METHODS
from mooring.config.schema import RunConfig
from mooring.data.batch import Batch, named_views
from mooring.errors import ConfigError
from mooring.methods.base import Resources
from mooring.methods.registry import build_method, needs_of
from mooring.models.batchnorm import freeze_statistics
from mooring.models.encoder import build_encoder
from mooring.models.head import build_head

CLASSES = 10
# what turns every term on
EXTRA: dict[str, dict[str, Any]] = {
    "feature_map": {"map_pull": 1e-4},
    "delta": {"map_pull": 1e-4},
    "feature_distillation": {"feature_pull": 1e-3},
    "bi_tuning": {"image_contrast": 0.1, "class_contrast": 0.1, "queue_rows": 4},
    "concept_tuning": {"image_contrast": 0.1, "concept_contrast": 0.1, "queue_rows": 4},
}


def config_of(model: str, method: Any = "fine_tune", **train: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"data": "x", "method": method, "model": {"name": model}, "train": train}, strict=False
    )


def test_the_ledger_on_a_small_network() -> None:
    """Two linear layers: every number by hand."""
    rows, width, hidden = 16, 8, 32
    network = nn.Sequential(nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, 1, bias=False))
    x = torch.randn(rows, width)
    with Ledger(network.parameters()) as ledger:
        ledger.ignore([*network.parameters(), x])
        loss = network(x).sum()
        kept = ledger.live
        loss.backward()
    # the input of the second layer is the only thing kept beside prediction and loss
    assert kept - 4 * (rows * hidden + 1) in (0, 4 * rows)
    assert ledger.gradients == 4 * (width * hidden + hidden)
    products = 2 * rows * (width * hidden + hidden)
    assert ledger.flops == products + 2 * rows * width * hidden + 2 * 2 * rows * hidden
    assert ledger.peak_with_gradients >= ledger.peak >= kept
    ledger.close()


def real_peak(config: RunConfig, batch: int, precision: str) -> tuple[int, int, int]:
    """Bytes that torch's allocator holds: before a real step, at the end of its forward, at its worst moment."""
    needs, side = needs_of(config.method), config.train.image_size or 224
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        encoder = build_encoder(config.model.name, weights="none", image_size=config.train.image_size)
        resources = Resources(
            classes=tuple(str(number) for number in range(CLASSES)),
            text_features=torch.randn(CLASSES, 384) if needs.text_features else None,
            source_head=nn.Linear(encoder.feature_dim, 1000) if needs.source_head else None,
            image_size=side,
        )
        method = build_method(
            config.method, encoder, build_head(encoder.feature_dim, CLASSES), resources=resources
        )
        if (needs.batchnorm or "frozen") == "frozen":
            freeze_statistics(encoder)
        method.train()
        with record_function("built"):
            pass

        def images() -> Tensor:
            return torch.randn(batch, 3, side, side).contiguous(memory_format=torch.channels_last)

        labels, ids = torch.arange(batch) % CLASSES, torch.arange(batch)
        source = Batch(images(), labels, ids) if needs.source_stream else None
        given = Batch(
            images(), labels, ids, views=named_views([images() for _ in needs.views]), source=source
        )
        method.before_step(MIDWAY)
        with record_function("begin"):
            pass
        with torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext():
            output = method(given, MIDWAY)
        with record_function("forward"):
            pass
        output.loss.backward()
        with record_function("end"):
            pass
    events = list(profiler.profiler.kineto_results.events())  # type: ignore[union-attr]
    marks = {event.name(): event.start_ns() for event in events}
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    before = sum(size for when, size in changes if when < marks["built"])
    kept = sum(size for when, size in changes if marks["begin"] <= when < marks["forward"])
    level, worst = 0, 0
    for when, size in changes:
        if marks["begin"] <= when < marks["end"]:
            level += size
            worst = max(worst, level)
    return before, kept, worst


@pytest.mark.parametrize(
    ("model", "method", "precision", "train"),
    [
        ("vit_tiny_patch16_224", "fine_tune", "fp32", {"image_size": 96}),
        ("vit_tiny_patch16_224", "dr_tune", "bf16", {"image_size": 96}),
        ("resnet26t", "fine_tune", "fp32", {"image_size": 96}),
        pytest.param("vit_small_patch16_224", "dr_tune", "fp32", {}, marks=pytest.mark.slow),
        pytest.param("vit_small_patch16_224", "fine_tune", "bf16", {}, marks=pytest.mark.slow),
        pytest.param("resnet50", "fine_tune", "fp32", {}, marks=pytest.mark.slow),
        pytest.param("resnet50", "dr_tune", "bf16", {}, marks=pytest.mark.slow),
        pytest.param("convnext_atto", "fine_tune", "fp32", {}, marks=pytest.mark.slow),
    ],
)
def test_memory_is_within_fifteen_percent_of_a_real_step(
    model: str, method: str, precision: str, train: dict[str, Any]
) -> None:
    batch = 8
    config = config_of(model, method, **train)
    before, kept, worst = real_peak(config, batch, precision)
    subject = build_subject(config, CLASSES)
    counted = sizes(subject)
    traced = trace(subject, batch, precision=precision)
    assert traced.activations == pytest.approx(kept, rel=0.15)
    assert traced.peak_with_gradients == pytest.approx(worst, rel=0.15)
    assert 4 * counted.parameters + counted.frozen + counted.banks == pytest.approx(before, rel=0.15)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_methods_own_step_is_traced(method: str) -> None:
    """With every term: its memory is that of a real step, in what is kept and at the worst moment."""
    settings, batch = {"name": method, **EXTRA.get(method, {})}, 8
    config = config_of("vit_tiny_patch16_224", settings, image_size=64, batch_size=batch)
    counted = sizes(build_subject(config, CLASSES))
    step = traced_step(config, CLASSES, batch, precision="fp32")
    _, kept, worst = real_peak(config, batch, "fp32")
    assert 0 < counted.trainable <= counted.parameters
    assert step.activations == pytest.approx(kept, rel=0.15)
    assert step.peak_with_gradients == pytest.approx(worst, rel=0.15)


def test_banks_and_frozen_encoders_are_counted() -> None:
    counted = sizes(build_subject(config_of("resnet10t", "dr_tune", image_size=64), CLASSES))
    assert counted.banks == 2048 * (2 * 512 * 4 + 16)
    assert counted.bank_row == 2 * 512 * 4 + 16
    assert counted.frozen >= 4 * (counted.parameters - 512 * CLASSES - CLASSES) * 0.99


def test_checkpointing_keeps_less_and_computes_more() -> None:
    config = config_of("vit_tiny_patch16_224", image_size=96)
    plain = traced_step(config, CLASSES, 8, precision="fp32")
    again = traced_step(config, CLASSES, 8, precision="fp32", checkpointing=True)
    assert again.activations < plain.activations / 3
    assert 1.2 * plain.flops < again.flops < 1.4 * plain.flops


def test_no_checkpointing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = build_subject(config_of("resnet10t", image_size=64), CLASSES)
    monkeypatch.delattr(type(subject.encoder.model), "set_grad_checkpointing")
    with pytest.raises(ConfigError, match="resnet10t has no activation checkpointing"):
        trace(subject, 2, precision="fp32", checkpointing=True)


def test_work_of_a_vision_transformer() -> None:
    """ViT-B/16 at 224: 17.58 GMAC forward [Touvron et al., DeiT, table 5], so 105 GFLOP forward and backward."""
    config = config_of("vit_base_patch16_224")
    one, two = (traced_step(config, 1000, batch, precision="bf16").flops for batch in (1, 2))
    # the gradient with respect to the images is not computed
    assert two - one == pytest.approx(3 * 2 * 17.58e9, rel=0.03)


def test_nothing_of_the_model_is_allocated() -> None:
    """A billion parameters are planned in no memory to speak of."""
    subject: Subject = build_subject(config_of("vit_giant_patch14_224"), 1000)
    assert sizes(subject).parameters > 1e9
    assert all(parameter.device.type == "meta" for parameter in subject.method.parameters())
