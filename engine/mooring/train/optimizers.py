"""The optimizers by name, each in the fastest implementation that is there."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import torch
from torch.optim import Optimizer

from mooring.config.schema import OptimizerSettings
from mooring.errors import MissingDependencyError
from mooring.train.lamb import Lamb

_DEFAULT_LR = {"sgd": 0.01, "adamw": 3e-4, "lamb": 2e-3}

_APEX_INSTALL = (
    "git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
    "python -m pip install -v --no-build-isolation .  (nvcc must have the version of torch's CUDA; "
    "the package named apex on PyPI is another one)"
)


def default_lr(name: str) -> float:
    """Backbone learning rate for fine-tuning where the user set none: sgd 0.01, adamw 3e-4, lamb 2e-3.

    Of the size that suits batches of 32 to 128 images; not scaled with the batch.
    """
    return _DEFAULT_LR[name]


def apex_available(device: torch.device) -> bool:
    """Whether NVIDIA Apex's compiled optimizers can run on ``device``.

    Looks for the compiled module: ``import apex`` also succeeds without it, and a web toolkit has the name.
    """
    return device.type == "cuda" and torch.cuda.is_available() and find_spec("amp_C") is not None


def build_optimizer(
    groups: list[dict[str, Any]], settings: OptimizerSettings, device: torch.device | str
) -> Optimizer:
    """An optimizer over parameter groups that carry their own ``lr`` and ``weight_decay``.

    Args:
        groups: from ``mooring.models.groups.parameter_groups``; further keys are kept.
        settings: name, implementation and hyper-parameters.
        device: where the parameters lie.

    Raises:
        MissingDependencyError: ``implementation="apex"`` and its compiled modules or CUDA are missing.
    """
    device = torch.device(device)
    apex = apex_available(device)
    if settings.implementation == "apex" and not apex:
        found = "is" if find_spec("amp_C") is not None else "is not"
        raise MissingDependencyError(
            f"optimizer.implementation=apex needs NVIDIA Apex's compiled module amp_C and a CUDA device; "
            f"amp_C {found} installed, the run's device is {device}: set optimizer.implementation=torch, "
            f"or install it with  {_APEX_INSTALL}"
        )
    groups = [dict(group) for group in groups]
    if settings.implementation != "torch" and apex:
        return _apex(groups, settings)
    return _torch(groups, settings, device)


def _torch(groups: list[dict[str, Any]], settings: OptimizerSettings, device: torch.device) -> Optimizer:
    # torch has fused kernels for floating parameters on these devices, and foreach everywhere
    on_fused_device = device.type in ("cuda", "cpu") and all(
        p.device.type in (device.type, "meta") and p.is_floating_point()  # meta: not loaded yet
        for group in groups
        for p in group["params"]
    )
    kernel = {"fused": True} if on_fused_device else {"foreach": True}
    match settings.name:
        case "sgd":
            sgd = torch.optim.SGD(
                groups,
                lr=default_lr("sgd"),
                momentum=settings.momentum,
                nesterov=settings.nesterov,
                **kernel,
            )
            _start_momentum(sgd)
            return sgd
        case "adamw":
            return torch.optim.AdamW(
                groups,
                lr=default_lr("adamw"),
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=0.0,
                **kernel,
            )
        case "lamb":
            return Lamb(groups, lr=default_lr("lamb"), betas=settings.betas, eps=settings.eps)


def _start_momentum(optimizer: torch.optim.SGD) -> None:
    """Momentum buffers of zeros, from which the first step comes out the same.

    torch's fused SGD fails where a parameter gets its first gradient after others of its group.
    """
    for group in optimizer.param_groups:
        if group["momentum"] != 0:
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _apex(groups: list[dict[str, Any]], settings: OptimizerSettings) -> Optimizer:
    optimizers = importlib.import_module("apex.optimizers")
    match settings.name:
        case "sgd":
            return optimizers.FusedSGD(
                groups, lr=default_lr("sgd"), momentum=settings.momentum, nesterov=settings.nesterov
            )
        case "adamw":
            return optimizers.FusedAdam(
                groups,
                lr=default_lr("adamw"),
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=0.0,
                adam_w_mode=True,
            )
        case "lamb":
            # an infinite limit turns its built-in clipping of the gradient norm off: the engine clips
            return optimizers.FusedLAMB(
                groups,
                lr=default_lr("lamb"),
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=0.0,
                max_grad_norm=float("inf"),
            )
