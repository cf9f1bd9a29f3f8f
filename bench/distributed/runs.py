"""Runs on several gloo ranks of this machine, from random images and weights that are made here."""

from __future__ import annotations

import datetime
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import environment, records
from bench.environment import ROOT
from mooring.config.load import load_config
from mooring.data.batch import Batch
from mooring.train.engine import Engine

FOLDER = records.FOLDER / "distributed"
MODELS = {"vit": "vit_tiny_patch16_224", "cnn": "resnet18"}
_SETTINGS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
# Settings that a method needs to have all of its terms.
TERMS: dict[str, Sequence[str]] = {
    "feature_map": ("method.map_pull=1e-4",),
    "delta": ("method.map_pull=1e-4",),
    "feature_distillation": ("method.feature_pull=1e-3",),
    "concept_tuning": ("method.contrast_warm_up=0.0",),
    "tes": ("method.text={folder}/text.npz",),
    "soft_fine_tuning": ("method.source_data={folder}/source",),
}


def write_data(folder: Path, classes: int, images: int, side: int) -> None:
    """Random photos of so many classes, those of a source task, a text vector of each class, weights of each model."""
    from safetensors.torch import save_file

    from mooring.models.torchvision_shim import import_timm

    drawn = np.random.default_rng(0)
    for root, counts in (("photos", {"train": images, "val": classes}), ("source", {"train": 80, "val": 10})):
        for split, count in counts.items():
            for number in range(count):
                label = number % (classes if root == "photos" else 10)
                place = folder / root / split / f"c{label:03}"
                place.mkdir(parents=True, exist_ok=True)
                pixels = drawn.integers(0, 255, (side + 8, side + 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    names = np.array([f"c{label:03}" for label in range(classes)])
    np.savez(
        folder / "text.npz", names=names, features=drawn.standard_normal((classes, 384)).astype("float32")
    )
    for name in MODELS.values():
        torch.manual_seed(0)
        save_file(
            import_timm().create_model(name, num_classes=10).state_dict(), folder / f"{name}.safetensors"
        )


def words(folder: Path, kind: str, method: str, *further: str, side: int, batch: int) -> list[str]:
    """The settings of a run on what ``write_data`` wrote."""
    name = MODELS[kind]
    terms = [word.format(folder=folder) for word in TERMS.get(method, ())]
    return [
        f"data={folder}/photos", f"model.name={name}", f"model.weights={folder}/{name}.safetensors",
        f"train.image_size={side}", f"train.eval_size={side}", f"train.batch_size={batch}", "train.epochs=200",
        "train.threads=1", "train.device=cpu", "data.workers=1", "data.source=torch", "report.progress=quiet",
        f"method={method}", *terms, *further,
    ]  # fmt: skip


def opened(settings: Sequence[str]) -> tuple[Engine, Iterator[list[Batch]]]:
    """An engine in the middle of its run, and micro-batches that are ready."""
    engine = Engine.build(load_config(None, list(settings)))
    engine.prepare()
    groups = cycle(list(islice(engine.epoch_groups(), 2)))
    engine.train_source.close()
    engine.global_step = int(0.6 * engine.total_steps) // 20 * 20  # past warm-ups; a multiple of all periods
    return engine, groups


def start(module: str, world: int, folder: Path, *arguments: str) -> None:
    """``python -m module --worker FOLDER`` on so many ranks of this machine.

    Raises:
        RuntimeError: a rank failed; the others are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    shared = {"PYTHONPATH": path, "MOORING_CACHE": str(folder / "cache"), "WORLD_SIZE": str(world)}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", module, "--worker", str(folder), *arguments]
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | _SETTINGS | shared | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    try:
        while (codes := [rank.poll() for rank in ranks]).count(0) < world:
            if any(codes):
                raise RuntimeError(f"{module} on {world} ranks ended with {codes}")
            time.sleep(0.5)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()


def without_folder(settings: Iterable[str], folder: Path) -> list[str]:
    """Settings as a record holds them: no place on a machine."""
    return [word for word in settings if str(folder) not in word]


def record(name: str, what: dict[str, Any]) -> None:
    """Appends one measurement with all that it depends on."""
    found = {
        **what,
        "environment": environment.describe(torch.device("cpu")),
        "commit": environment.commit(),
        "load": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(records.rounded(found)) + "\n")
