"""CIFAR-10 from sprites: the same pixels, one file an image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.accuracy.unpack_cifar10 import unpack


def write_sprites(folder: Path, labels: list[int]) -> np.ndarray:
    rows = np.random.default_rng(0).integers(0, 256, (len(labels), 1024, 3), dtype=np.uint8)
    folder.mkdir()
    for split in ("train", "test"):
        Image.fromarray(rows).save(folder / f"{split}.png")
        text = json.dumps({"classes": ["cat", "dog"], "labels": labels})
        (folder / f"{split}.json").write_text(text, encoding="utf-8")
    return rows


def test_sprites_are_unpacked_without_loss(tmp_path: Path) -> None:
    rows = write_sprites(tmp_path / "sprites", [1, 0, 1])
    assert unpack(tmp_path / "sprites", tmp_path / "out") == {"train": 3, "test": 3}
    second = Image.open(tmp_path / "out" / "train" / "cat" / "00001.png")
    assert np.array_equal(np.asarray(second).reshape(1024, 3), rows[1])
    assert len(list((tmp_path / "out" / "test" / "dog").iterdir())) == 2
    assert (tmp_path / "out" / "classes.tsv").read_text() == "cat\t0\ndog\t1\n"
    (tmp_path / "sprites" / "train.json").write_text('{"classes": ["cat"], "labels": [0]}')
    with pytest.raises(ValueError, match="1 rows"):
        unpack(tmp_path / "sprites", tmp_path / "again")
