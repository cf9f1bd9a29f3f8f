"""The full list of settings, frozen: a change here is a change of the public interface."""

from __future__ import annotations

from typing import Any

import pytest

from mooring.config.keys import METHODS, all_keys, nearest
from mooring.config.load import load_config
from mooring.config.schema import RunConfig

FROZEN: dict[str, Any] = {
    "data.path": None,
    "data.source": "auto",
    "data.augment": "standard",
    "data.val_fraction": 0.15,
    "data.shots": None,
    "data.fraction": None,
    "data.classes": None,
    "data.unseen_classes": None,
    "data.workers": 2,
    "data.max_pixels": 100_000_000,
    "data.image_column": None,
    "data.label_column": None,
    "data.split_column": None,
    "data.extra_test": {},
    "out": None,
    "seed": 0,
    "resume": None,
    "allow_inexact": False,
    "model.name": "tf_efficientnet_lite0",
    "model.weights": "auto",
    "model.drop_rate": 0.0,
    "model.drop_path_rate": 0.0,
    "method.name": "dr_tune",
    "method.probe_fraction": 0.3,
    "method.bank_size": 2048,
    "method.bank_dtype": "float32",
    "method.bank_scope": "gathered",
    "method.rotation": "cached",
    "method.calibration": "code",
    "method.rotation_period": 10,
    "method.rotation_ridge": 0.001,
    "method.rotation_centred": True,
    "method.rotation_det_fix": False,
    "method.rotation_solver": "auto",
    "method.translation": True,
    "method.cga_scale": 1.0,
    "method.loss_form": "mean",
    "method.head_init_std": 0.01,
    "method.backbone_pull": 0.01,
    "method.head_pull": 0.01,
    "method.map_pull": 0.48,
    "method.attention": "taylor",
    "method.attention_batches": 10,
    "method.shrinkage": 0.001,
    "method.singular_values": 1,
    "method.batch_probability": 0.5,
    "method.distillation": 4.0,
    "method.distillation_temperature": 3.0,
    "method.feature_pull": 1.0,
    "method.regressor": "identity",
    "method.co_weight": 2.3,
    "method.image_contrast": 1.0,
    "method.class_contrast": 1.0,
    "method.contrast_temperature": 0.07,
    "method.queue_rows": 40,
    "method.queue_scope": "gathered",
    "method.key_momentum": 0.999,
    "method.embed_width": 128,
    "method.contrast_weight": 0.1,
    "method.contrast_width": 256,
    "method.mix_alpha": 1.0,
    "method.parity": "corrected",
    "method.reference": "instance",
    "method.tau": 0.03,
    "method.lambda_v": 0.1,
    "method.lambda_t": 0.3,
    "method.lambda_v_ramp": 0.0,
    "method.projection_width": None,
    "method.text": "auto",
    "method.templates": ["a photo of {a} {name}"],
    "method.class_names": None,
    "method.source": "data",
    "method.source_data": None,
    "method.source_classes": None,
    "method.source_images": None,
    "method.source_batch_size": None,
    "method.source_shrink": True,
    "method.w0": 1.0,
    "method.soft_schedule": "linear",
    "method.soft_fraction": 1.0,
    "method.soft_power": 2.0,
    "method.soft_until": 0.5,
    "method.soft_granularity": "step",
    "method.target_weight": "one",
    "method.source_bn": "auto",
    "method.conversion": True,
    "method.zero_head": True,
    "method.head_lr": "auto",
    "method.calib_transform": "train",
    "method.calib_images": None,
    "method.concept_contrast": 1.0,
    "method.bottleneck_penalty": 0.005,
    "method.concept_start_epoch": 0,
    "method.contrast_warm_up": "auto",
    "method.concept_source": "patches",
    "method.patches": 9,
    "method.patch_side": None,
    "method.patch_bn": "joint",
    "method.group_width": None,
    "method.rank_stride": None,
    "method.rivals": 3,
    "method.negative_classes": 100,
    "method.negatives_per_set": 10,
    "method.transport_entropy": 0.01,
    "method.transport_rounds": 30,
    "method.peak": "corner",
    "method.channel_slices": 8,
    "method.embed": "auto",
    "method.random_init_queue": False,
    "method.fusion": "sum",
    "method.bottleneck": 512,
    "method.kl": "code",
    "method.predict": "avg",
    "train.epochs": 20,
    "train.batch_size": 32,
    "train.accumulate": 1,
    "train.image_size": None,
    "train.eval_size": None,
    "train.precision": "auto",
    "train.channels_last": True,
    "train.batchnorm": "auto",
    "train.sync_batchnorm": True,
    "train.clip_grad_norm": None,
    "train.label_smoothing": 0.0,
    "train.mixup": 0.0,
    "train.cutmix": 0.0,
    "train.ema_decay": None,
    "train.compile": False,
    "train.device": "auto",
    "train.threads": None,
    "optimizer.name": "adamw",
    "optimizer.implementation": "auto",
    "optimizer.lr": None,
    "optimizer.head_lr_multiplier": None,
    "optimizer.layer_decay": None,
    "optimizer.weight_decay": 0.0001,
    "optimizer.decay_norm_and_bias": False,
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": True,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-08,
    "schedule.name": "cosine",
    "schedule.warmup_epochs": 1.0,
    "schedule.final_ratio": 0.0,
    "schedule.milestones": [0.6, 0.8],
    "schedule.gamma": 0.1,
    "backend.name": "auto",
    "backend.zero_stage": 1,
    "backend.offload_optimizer": False,
    "backend.offload_parameters": False,
    "backend.sharded_loading": "auto",
    "backend.deepspeed_config": None,
    "backend.activation_checkpointing": False,
    "backend.timeout_minutes": 30.0,
    "health.nonfinite": "stop",
    "health.max_skips": 10,
    "health.spike": 6.0,
    "health.hang_after": 300.0,
    "health.hang_after_slow": 1800.0,
    "health.hang_abort": None,
    "health.compare_banks_every": 1000,
    "checkpoint.every": None,
    "checkpoint.keep_last": 2,
    "checkpoint.keep_best": 0,
    "checkpoint.keep_every": None,
    "checkpoint.background": True,
    "report.progress": "auto",
    "report.log_every": 10,
    "report.tensorboard": True,
    "report.plots": True,
    "report.distortion": False,
    "report.discrimination": False,
    "report.unseen": None,
    "report.source": None,
    "report.source_classes": None,
}
# `data` and `method` themselves are the short forms of data.path and method.name
PROMISED = (
    "out", "seed", "model.name", "model.weights", "method.name", "train.epochs", "train.batch_size",
    "train.image_size", "optimizer.name", "optimizer.lr", "backend.name", "resume",
)  # fmt: skip


def test_keys_and_defaults_are_frozen() -> None:
    assert {key.name: key.default for key in all_keys().values()} == FROZEN


def test_promised_keys_stay() -> None:
    assert set(PROMISED) <= set(all_keys())


def test_only_the_data_must_be_given() -> None:
    assert [key.name for key in all_keys().values() if key.required] == ["data.path"]


@pytest.mark.parametrize("key", all_keys().values(), ids=lambda key: key.name)
def test_every_key_is_described_and_can_be_set_to_its_default(key: Any) -> None:
    assert key.description, "each key needs a line for `mooring info --keys`"
    assert key.expected
    value = "photos" if key.required else "none" if key.default is None else key.default
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    overrides = ["data=photos", f"{key.name}={shown}"]
    expected = RunConfig.model_validate({"data": "photos"})
    if key.methods:
        overrides.append(f"method={key.methods[0]}")
        expected = expected.model_copy(update={"method": METHODS[key.methods[0]]()})
    assert load_config(None, overrides) == expected


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("lr", "optimizer.lr"),
        ("epochs", "train.epochs"),
        ("train.epoch", "train.epochs"),
        ("optimiser.lr", "optimizer.lr"),
        ("modle.name", "model.name"),
        ("bank_size", "method.bank_size"),
        ("method.bank-size", "method.bank_size"),
        ("batch_size", "train.batch_size"),
        ("qqq.zzz", None),
    ],
)
def test_nearest_name(word: str, found: str | None) -> None:
    assert nearest(word, tuple(all_keys())) == found
