"""Device and precision of a run, chosen or checked before anything is built."""

from __future__ import annotations

import torch

from mooring.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """``auto`` takes CUDA where there is one.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        build = torch.version.cuda or "none (a CPU build)"
        raise ConfigError(
            f"train.device: got 'cuda', but torch sees no CUDA device (torch's CUDA: {build}): "
            "set train.device=cpu or auto, or install a CUDA build of torch"
        )
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """``auto`` is bf16 on a CUDA device that has it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def autocast_dtype(precision: str) -> torch.dtype | None:
    return torch.bfloat16 if precision == "bf16" else None
