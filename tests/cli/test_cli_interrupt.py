"""Ctrl-C as a user presses it: a real process, a real signal, and a run folder that can be used afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mooring.state.store import checkpoints_of
from mooring.train.inference import load_run


def test_ctrl_c_leaves_a_run_that_predicts_and_continues(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for c in range(2):
        folder = tmp_path / "photos" / f"class_{c}"
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = np.clip(90 + 90 * c + rng.normal(0, 30, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    settings = [
        f"data={tmp_path / 'photos'}", f"out={tmp_path / 'run'}", "model.name=resnet10t", "model.weights=none",
        "method=fine_tune", "train.image_size=32", "train.eval_size=32", "train.batch_size=4", "train.epochs=5000",
        "data.source=torch", "data.workers=1", "report.plots=false", "report.tensorboard=false",
    ]  # fmt: skip
    command = [sys.executable, "-m", "mooring.cli", "train"]
    environment = {**os.environ, "MOORING_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [*command, *settings], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        log = tmp_path / "run" / "metrics.jsonl"
        give_up = time.monotonic() + 240
        while not (log.is_file() and '"val"' in log.read_text()):  # one epoch is done, another is under way
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < give_up
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "mooring train --resume" in errors.replace("\n", " ")
    assert load_run(tmp_path / "run").classes == ["class_0", "class_1"]
    assert checkpoints_of(tmp_path / "run").newest().ref is not None
