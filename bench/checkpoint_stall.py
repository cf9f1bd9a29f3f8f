"""``python -m bench.checkpoint_stall``: how long a training step waits for a checkpoint, as a share of a step.

Rounds of a step alone and a step that is followed by a save alternate in one process, once with the write in the
background and once without. The clock is the CPU time of the training thread, at one thread of torch: what other
load on a shared machine does not lengthen. The wall, which holds the waits for the disk too, is recorded beside it.
No save has to wait for the write before it: the rounds do that between them.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench import environment, records
from bench.timing import Quantiles
from mooring.config.schema import RunConfig
from mooring.train.engine import Engine

_Clocks = tuple[float, float]
MODELS = ("tf_efficientnet_lite0", "resnet50", "vit_small_patch16_224")


def _photos(folder: Path, count: int) -> Path:
    for split in ("train", "val"):
        for c in range(2):
            (folder / split / str(c)).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (224, 224), (100 * c, i, 90)).save(folder / split / str(c) / f"{i}.png")
    return folder


def _clocked(call: Callable[[], object]) -> _Clocks:
    """CPU time of this thread, and the wall."""
    wall, cpu = time.perf_counter(), time.thread_time()
    call()
    return time.thread_time() - cpu, time.perf_counter() - wall


def measure(model: str, batch: int, rounds: int, method: str, folder: Path) -> list[dict[str, Any]]:
    """One entry for each way to write: seconds of the stall, and their share of the step before it."""
    photos = _photos(folder / "photos", batch)
    found = []
    for background in (True, False):
        config = RunConfig.model_validate(
            {
                "data": {"path": photos, "source": "torch", "workers": 1},
                "out": folder / f"run-{background}",
                "model": {"name": model, "weights": "none"},
                "method": {"name": method},
                "train": {
                    "batch_size": batch,
                    "image_size": 224,
                    "device": "cpu",
                    "threads": 1,
                    "epochs": 100,
                },
                "checkpoint": {"background": background, "keep_last": 1},
            }
        )
        with Engine.build(config) as engine:
            steps, saves, size = _rounds(engine, folder / f"run-{background}", rounds)
        pairs = list(zip(saves, steps, strict=True))
        found.append(
            {
                "candidate": "background" if background else "foreground",
                "seconds": asdict(Quantiles.of([cpu for cpu, _ in saves])),
                "wall_seconds": asdict(Quantiles.of([wall for _, wall in saves])),
                "step_seconds": asdict(Quantiles.of([cpu for cpu, _ in steps])),
                "share_of_step": asdict(Quantiles.of([save[0] / step[0] for save, step in pairs])),
                "wall_share_of_step": asdict(Quantiles.of([save[1] / step[1] for save, step in pairs])),
                "checkpoint_bytes": size,
                "rounds": rounds,
            }
        )
    return found


def _rounds(engine: Engine, run: Path, rounds: int) -> tuple[list[_Clocks], list[_Clocks], int]:
    """Clocks of steps and of the saves after them, and the size of a checkpoint."""
    images = next(iter(engine.train_source))
    checkpoints = engine.open_checkpoints(run)
    engine.step(images)  # the first step makes the optimizer's moments, the first save the memory of the copy
    checkpoints.save(engine, "warm-up")
    steps, saves = [], []
    for _ in range(rounds):
        checkpoints.wait()
        steps.append(_clocked(lambda: engine.step(images)))
        saves.append(_clocked(lambda: checkpoints.save(engine, "measured")))
    ref = checkpoints.wait()
    assert ref is not None
    return steps, saves, sum(file.stat().st_size for file in ref.folder.iterdir())


def main() -> int:
    """Measures, prints and records."""
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoint_stall", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--method", default="dr_tune")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--records", type=Path, default=records.FOLDER)
    chosen = parser.parse_args()
    described = environment.describe(torch.device("cpu"))
    identity = environment.identity(described)
    records.remember_environment(identity, described, chosen.records)
    for model in chosen.models:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["MOORING_CACHE"] = f"{folder}/cache"
            measured = measure(model, chosen.batch, chosen.rounds, chosen.method, Path(folder))
        for each in measured:
            records.append(
                {
                    "op": "checkpoint",
                    "size": f"{model}-B{chosen.batch}-{chosen.method}",
                    "dtype": "float32",
                    "device": "cpu",
                    "threads": 1,
                    "pass": "save",
                    "environment": identity,
                    "commit": environment.commit(),
                    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "load": os.getloadavg()[0],
                    "note": "seconds are CPU time of the training thread; AdamW; 224 px; random weights and images",
                    **each,
                },
                chosen.records,
            )
            cpu, wall = (1e3 * each[clock]["p50"] for clock in ("seconds", "wall_seconds"))
            print(
                f"{model:<24}{each['candidate']:<12}{each['checkpoint_bytes'] / 1e6:>7.0f} MB  "
                f"stall {cpu:>7.1f} ms of CPU, {wall:>7.1f} ms wall; "
                f"{each['share_of_step']['p50']:.2%} of a step "
                f"({each['share_of_step']['p20']:.2%} to {each['share_of_step']['p80']:.2%})",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
