"""The DeepSpeed settings of a run: ours, and what the user adds to them."""

from __future__ import annotations

import json
from typing import Any

from mooring.config.schema import RunConfig
from mooring.errors import ConfigError

# DeepSpeed's tables that a setting of ours decides, and that setting.
_OURS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clipping": "train.clip_grad_norm",
    "optimizer": "optimizer.name",
    "scheduler": "schedule.name",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "amp": "train.precision",
    "activation_checkpointing": "backend.activation_checkpointing",
    "zero_optimization.stage": "backend.zero_stage",
    "zero_optimization.offload_optimizer": "backend.offload_optimizer",
    "zero_optimization.offload_param": "backend.offload_parameters",
    "zero_allow_untested_optimizer": "optimizer.name",
    "zero_force_ds_cpu_optimizer": "optimizer.name",
    "checkpoint": "resume",
    "curriculum_learning": None,
    "data_efficiency": None,
    "compression_training": None,
    "hybrid_engine": None,
    "elasticity": None,
    "tensorboard": "report.tensorboard",
    "wandb": None,
}
# and the others that can be given
_FREE = frozenset(
    {
        "zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
        "sparse_gradients", "aio", "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown",
        "steps_per_print", "dump_state",
    }
)  # fmt: skip


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """What ``deepspeed.initialize`` gets.

    Micro-batches are counted by the engine, which tells DeepSpeed when a step is complete: one micro-batch a step
    here. Parameters stay in fp32 and products run in bf16 by autocast, as on one process: DeepSpeed's own bf16 would
    keep BatchNorm statistics in it, too.

    Raises:
        ConfigError: the settings contradict each other or ours; all of them are named.
    """
    backend = config.backend
    problems = []
    if backend.zero_stage > 0 and config.optimizer.name == "lamb":
        problems.append(
            "optimizer.name=lamb needs whole parameters for its ratio of norms, and backend.zero_stage="
            f"{backend.zero_stage} divides them: take backend.zero_stage=0, or adamw"
        )
    if backend.offload_optimizer and backend.zero_stage == 0:
        problems.append("backend.offload_optimizer needs backend.zero_stage of 1 or more")
    if backend.offload_parameters and backend.zero_stage != 3:
        problems.append(f"backend.offload_parameters needs backend.zero_stage=3; got {backend.zero_stage}")
    zero: dict[str, Any] = {"stage": backend.zero_stage}
    if backend.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if backend.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.clip_grad_norm
        if backend.zero_stage and config.train.clip_grad_norm
        else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    given = given_settings(config)
    for name in _names(given):
        if name in _OURS:
            instead = f": set {_OURS[name]}" if _OURS[name] else " with this engine"
            problems.append(f"backend.deepspeed_config: {name} is not for it to decide{instead}")
    for name in given.keys() - _OURS.keys() - _FREE:
        problems.append(f"backend.deepspeed_config: unknown or unsupported setting {name}")
    if problems:
        raise ConfigError("\n".join(problems))
    for name, value in given.items():
        settings[name] = {**settings[name], **value} if isinstance(settings.get(name), dict) else value
    return settings


def given_settings(config: RunConfig) -> dict[str, Any]:
    """What the file of ``backend.deepspeed_config`` holds; nothing where there is none.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    path = config.backend.deepspeed_config
    if path is None:
        return {}
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ConfigError(f"backend.deepspeed_config: expected a JSON file, got {path}: {err}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"backend.deepspeed_config: expected a JSON object in {path}")
    return given


def _names(given: dict[str, Any]) -> list[str]:
    """Of the settings; those of ``zero_optimization`` one by one."""
    inner = given.get("zero_optimization")
    return [*given] + ([f"zero_optimization.{name}" for name in inner] if isinstance(inner, dict) else [])
