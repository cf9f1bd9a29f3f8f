"""A small folder of generated photos and a small model, for runs of a few seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mooring.config.schema import RunConfig


def write_photos(root: Path, *, classes: int = 3, train: int = 12, test: int = 4, size: int = 48) -> Path:
    """``train|test/class/image``: each class has a colour, each image its own noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for c in range(classes):
            folder = root / split / f"class_{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                colour = np.array([200 - 70 * c, 60 + 60 * c, 40 + 80 * (c % 2)])
                pixels = np.clip(colour + rng.normal(0, 25, (size, size + 5, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=92)
    return root


@pytest.fixture(scope="session")
def photos_in():
    """``write_photos``, for sets of other sizes."""
    return write_photos


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classes of ``photos`` in another size, five test images each."""
    return write_photos(tmp_path_factory.mktemp("elsewhere"), train=1, test=5, size=40)


@pytest.fixture(scope="session")
def other_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos with a class that ``photos`` does not have."""
    return write_photos(tmp_path_factory.mktemp("other_classes"), classes=4, train=1, test=1)


@pytest.fixture
def make_config(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A factory of short run configurations; keyword arguments are tables to merge, or whole values."""
    monkeypatch.setenv("MOORING_CACHE", str(tmp_path / "cache"))

    def build(**changes: object) -> RunConfig:
        tables: dict[str, object] = {
            "data": {"path": photos, "source": "torch", "workers": 1},
            "out": tmp_path / "run",
            "model": {"name": "resnet10t", "weights": "none"},
            "method": {"name": "fine_tune"},
            "train": {"epochs": 2, "batch_size": 6, "image_size": 32, "eval_size": 32, "device": "cpu"},
            "report": {"progress": "quiet", "log_every": 2},
        }
        for key, value in changes.items():
            base = tables.get(key)
            tables[key] = {**base, **value} if isinstance(base, dict) and isinstance(value, dict) else value
        return RunConfig.model_validate(tables)

    return build
