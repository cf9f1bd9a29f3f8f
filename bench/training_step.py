"""``python -m bench.training_step``: the time of the rest of a training step, to hold a kernel's gain against.

Two parts are timed: the encoder forward and backward as it is trained, and a forward of a frozen or momentum copy
of it; ``bench.step_share`` puts the step of a method together from them. They are a yardstick like the copy rate, not
a candidate: a loss that gets 20 times faster and was 0.5 % of the step is a gain of 0.5 %.

On the CPU eight images are timed and the time is multiplied by B / 8. The record says so; a convolution costs
a little more per image at 8 than at 64.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from dataclasses import asdict
from typing import Any

from bench.threads import in_new_process

OP = "training_step"
ENCODERS = {"resnet50": "resnet50", "vit_base": "vit_base_patch16_224"}
TRAIN, FORWARD = "train", "forward"
BATCH = 64  # of the ops' own sizes
_CPU_BATCH = 8


def measure(
    encoder: str, device_name: str, threads: int, batch: int, rounds: int, budget_seconds: float
) -> None:
    """Times both parts of one encoder, prints and records them."""
    import torch
    from torch import nn

    from bench import environment, records
    from bench.timing import Quantiles, alternate
    from mooring.models.torchvision_shim import import_timm

    timm = import_timm()
    device = torch.device(device_name)
    if device.type == "cpu":
        torch.set_num_threads(threads)
    tuned: nn.Module = (
        timm.create_model(ENCODERS[encoder], pretrained=False, num_classes=0).to(device).train()
    )
    frozen: nn.Module = (
        timm.create_model(ENCODERS[encoder], pretrained=False, num_classes=0).to(device).eval()
    )
    images = torch.randn(batch, 3, 224, 224, device=device)

    def train() -> None:
        features = tuned(images)
        features.backward(torch.randn_like(features))

    def forward() -> None:
        with torch.inference_mode():
            frozen(images)

    # the first calls warm up; where they take seconds nothing more is needed
    samples = alternate(
        {TRAIN: train, FORWARD: forward}, device, rounds=rounds, budget_seconds=budget_seconds, warm_up=1
    )
    described = environment.describe(device)
    identity = environment.identity(described)
    records.remember_environment(identity, described)
    for part, taken in samples.items():
        scale = BATCH / batch
        record: dict[str, Any] = {
            "op": OP,
            "size": f"B{BATCH}",
            "dtype": "float32",
            "device": device.type,
            "pass": part,
            "candidate": encoder,
            "model": ENCODERS[encoder],
            "measured_batch": batch,
            "scaled_by": scale,
            "seconds": asdict(Quantiles.of([scale * s for s in taken.seconds])),
            "rounds": len(taken.seconds),
            "environment": identity,
            "commit": environment.commit(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "note": f"measured at {batch} images of 224 px and multiplied by {scale:g}; random weights and images; "
            "fp32; head, loss and optimizer not included",
        }
        if device.type == "cpu":
            wall = Quantiles.of([scale * s for s in taken.wall_seconds])
            record |= {"threads": threads, "wall_seconds": asdict(wall)}
        records.append(record)
        seconds = record.get("wall_seconds", record["seconds"])
        print(
            f"{encoder:<12}{part:<10}threads={threads}  {seconds['p50']:.4f} s for {BATCH} images", flush=True
        )


def main() -> int:
    """Measures and records; returns 2 where timm or the device is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.training_step", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--encoders", nargs="+", choices=tuple(ENCODERS), default=tuple(ENCODERS))
    parser.add_argument("--batch", type=int, help=f"images timed; {_CPU_BATCH} on the CPU, {BATCH} on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each encoder and thread count")
    chosen = parser.parse_args()
    batch = chosen.batch or (BATCH if chosen.device == "cuda" else _CPU_BATCH)
    for threads in chosen.threads if chosen.device == "cpu" else [0]:
        for encoder in chosen.encoders:
            plan = (encoder, chosen.device, threads, batch, chosen.rounds, chosen.seconds)
            try:
                in_new_process(threads, "bench.training_step:measure", *plan)
            except ImportError as error:
                print(
                    f"the training step needs timm, which cannot be imported here: {error}", file=sys.stderr
                )
                return 2
            except RuntimeError as error:
                print(f"not measured: {str(error).splitlines()[0]}", file=sys.stderr)
                return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
