"""Resident memory over many training steps of a tiny model, as the engine takes them.

    python tests/train/memory_growth.py --steps 2000 [--source dali]

Prints one JSON line: MB after warm-up and at the end, and the growth in KB a step.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mooring.config.schema import RunConfig
from mooring.train.engine import Engine


def resident() -> int:
    """Bytes that this process has written to memory: pages of files come and go with what else the machine does."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def measure(steps: int, warm_up: int, source: str) -> dict[str, float]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root, rng = Path(name), np.random.default_rng(0)
        for label in "abc":
            (root / "photos" / label).mkdir(parents=True)
            for number in range(10):
                pixels = rng.integers(0, 255, (40, 44, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "photos" / label / f"{number}.jpg")
        config = RunConfig.model_validate(
            {
                "data": {"path": root / "photos", "source": source, "workers": 1},
                "model": {"name": "resnet10t", "weights": "none"},
                "method": {"name": "dr_tune", "bank_size": 16},
                "train": {
                    "epochs": 10 * steps, "batch_size": 4, "image_size": 32, "eval_size": 32, "device": "cpu",
                    "ema_decay": 0.99, "clip_grad_norm": 1.0, "mixup": 0.0,
                },
            }
        )  # fmt: skip
        with Engine.build(config) as engine:
            engine.prepare()
            before = 0
            while engine.global_step < warm_up + steps:
                for group in engine.epoch_groups():
                    engine.step(group)
                    if engine.global_step == warm_up:
                        before = resident()
                    if engine.global_step == warm_up + steps:
                        break
                if engine.global_step % 100 < engine.steps_per_epoch:
                    engine.validate()
            after = resident()
    return {
        "steps": steps,
        "MB after warm-up": round(before / 1e6, 1),
        "MB at the end": round(after / 1e6, 1),
        "KB a step": round((after - before) / 1e3 / steps, 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=100)
    parser.add_argument("--source", choices=["torch", "dali"], default="torch")
    options = parser.parse_args()
    print(json.dumps(measure(options.steps, options.warm_up, options.source)))
