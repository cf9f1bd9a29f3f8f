"""Pretrained parameters that no process holds all of: whether a run loads them so, and how the result leaves it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mooring.config.method_settings import method_title
from mooring.config.schema import RunConfig
from mooring.distributed import Ranks
from mooring.errors import ConfigError
from mooring.methods.base import Needs
from mooring.models.encoder import Encoder, encoder_of, weights_file
from mooring.models.mapped_file import map_safetensors

_log = logging.getLogger(__name__)

# Of the device's memory; gradients, optimizer state and activations want the rest.
_SHARE = 0.25


def loads_in_parts(config: RunConfig, needs: Needs, device: torch.device, ranks: Ranks) -> bool:
    """Whether the encoder's parameters are read one by one as ``backend.sharded_loading`` says.

    Raises:
        ConfigError: they should be, and this run cannot; all reasons are named.
    """
    setting = config.backend.sharded_loading
    if setting is False:
        return False
    file = _safetensors(config)
    reasons = _reasons_against(config, needs, ranks, file)
    if setting is True:
        if reasons:
            raise ConfigError("backend.sharded_loading=true: " + "; ".join(reasons))
        return True
    if config.backend.zero_stage < 3 or ranks.world == 1 or file is None:
        return False
    wanted = 4 * sum(tensor.numel() for tensor in map_safetensors(file).values())
    if wanted <= _SHARE * _memory(device, ranks):
        return False
    if reasons:
        _log.warning(
            "every process loads the whole model, %.1f GB, before it is divided: %s",
            wanted / 1e9,
            "; ".join(reasons),
        )
    return not reasons


def _reasons_against(config: RunConfig, needs: Needs, ranks: Ranks, file: Path | None) -> list[str]:
    backend = config.backend
    reasons = []
    if backend.zero_stage < 3 or backend.name in ("local", "ddp") or ranks.world == 1:
        reasons.append(
            f"parameters are divided by backend.name=deepspeed with backend.zero_stage=3; got {backend.name} with "
            f"{backend.zero_stage} and {ranks.world} processes"
        )
    if not needs.encoder_in_parts:
        reasons.append(
            f"method.name={method_title(config.method)} copies, reads or runs the whole encoder before the first step, "
            "on every process"
        )
    if file is None:
        reasons.append(
            "the weights must be a .safetensors file of their own: set model.weights=FILE, or put them into the "
            f"weight cache; got model.weights={config.model.weights}"
        )
    if config.train.ema_decay is not None:
        reasons.append("train.ema_decay keeps a whole average on every process")
    if config.report.distortion:
        reasons.append("report.distortion keeps a whole pretrained encoder on every process")
    return reasons


def _safetensors(config: RunConfig) -> Path | None:
    file = weights_file(config.model.name, config.model.weights, None)
    return file if file is not None and file.suffix == ".safetensors" and file.is_file() else None


def _memory(device: torch.device, ranks: Ranks) -> float:
    """Bytes that one process has of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / here


def on_host(
    config: RunConfig, encoder: Encoder, head: nn.Linear, weights: Mapping[str, Tensor]
) -> tuple[Encoder, nn.Linear]:
    """Encoder and head as ordinary modules in host memory, with the weights of a run.

    Args:
        config: of the run.
        encoder, head: the run's own, divided.
        weights: of its method, whole: ``encoder.model.*`` and ``head.*``.
    """
    with torch.random.fork_rng(devices=[]):
        whole = encoder_of(config, weights="none")
        linear = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
    for module, prefix in ((whole.model, "encoder.model."), (linear, "head.")):
        module.load_state_dict(
            {name.removeprefix(prefix): w.cpu() for name, w in weights.items() if name.startswith(prefix)}
        )
    whole.train(encoder.training)
    return whole, linear
