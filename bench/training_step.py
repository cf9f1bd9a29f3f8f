"""``python -m bench.training_step``: the time of the rest of a DR-Tune step, to hold a kernel's gain against.

The rest is the tuned encoder forward and backward and the frozen encoder forward, on random images. It is a
yardstick like the copy rate, not a candidate: a loss that gets 20 times faster and was 0.5 % of the step is
a gain of 0.5 %.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from dataclasses import asdict

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from bench import environment, records
from bench.operation import RESNET50, SIZES, VIT_B, Size
from bench.timing import Quantiles, alternate

OP = "training_step"
ENCODERS = {RESNET50: "resnet50", VIT_B: "vit_base_patch16_224"}


def encoder_step(tuned: nn.Module, frozen: nn.Module, images: Tensor) -> Tensor:
    """Forward of both encoders, and backward of a random projection of the tuned features."""
    with torch.inference_mode():
        frozen(images)
    features = tuned(images)
    features.backward(torch.randn_like(features))
    return features.detach()


def measure(size: Size, device: torch.device, rounds: int) -> records.Record:
    """Times one step of the encoders that belong to ``size``."""
    import timm

    tuned = timm.create_model(ENCODERS[size], pretrained=False, num_classes=0).to(device).train()
    frozen = timm.create_model(ENCODERS[size], pretrained=False, num_classes=0).to(device).eval()
    images = torch.randn(size.B, 3, 224, 224, device=device)
    samples = alternate(
        {OP: lambda: encoder_step(tuned, frozen, images)}, device, rounds=rounds, budget_seconds=120.0
    )[OP]
    described = environment.describe(device)
    identity = environment.identity(described)
    records.remember_environment(identity, described)
    return {
        "op": OP,
        "size": str(size),
        "dtype": "float32",
        "device": device.type,
        "pass": "both",
        "candidate": ENCODERS[size],
        "seconds": asdict(Quantiles.of(samples)),
        "rounds": len(samples),
        "environment": identity,
        "commit": environment.commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "note": "random weights and images; fp32; head, loss and optimizer not included",
    }


def main() -> int:
    """Measures and records; returns 2 where timm or the device is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.training_step", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    try:
        import timm  # noqa: F401
    except ImportError as error:
        print(
            f"the training step needs timm, which cannot be imported here: {error}",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for size in SIZES:
        record = measure(size, torch.device(chosen.device), chosen.rounds)
        records.append(record)
        print(f"{record['candidate']:<24}{record['size']:<24}{record['seconds']['p50']:.4f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
