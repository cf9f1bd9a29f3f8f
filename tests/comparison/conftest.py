"""A small folder of generated photos, a small model, and the words of a short comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train|test/class/image``: two classes that differ in colour, with noise."""
    root = tmp_path_factory.mktemp("compared")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 4)):
        for c in range(2):
            folder = root / split / f"class_{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(110 + 30 * c + rng.normal(0, 50, (36, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def words(
    photos: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Settings of a run of a second."""
    monkeypatch.setenv("MOORING_CACHE", str(photos.parent / "compared-cache"))
    return [
        f"data={photos}", "data.source=torch", "data.workers=1", "model.name=resnet10t", "model.weights=none",
        "train.image_size=32", "train.eval_size=32", "train.batch_size=4", "train.epochs=2", "train.device=cpu",
        "report.plots=false", "report.tensorboard=false", "report.log_every=2", "report.progress=plain",
    ]  # fmt: skip
