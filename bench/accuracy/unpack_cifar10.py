"""Makes an image folder of CIFAR-10 kept as sprites: ``python -m bench.accuracy.unpack_cifar10 DIR OUT``.

DIR holds ``train.png`` and ``test.png`` (one image of 32x32 RGB pixels a row, 1024 pixels wide), and ``train.json`` and
``test.json`` (``classes``, and ``labels`` in row order). OUT gets ``train|test/CLASS/ROW.png`` with the same pixels,
and ``classes.tsv`` (class folder, class index) for ``method.source_classes``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32


def unpack(folder: Path, out: Path) -> dict[str, int]:
    """Writes the images of both splits and the class table.

    Returns:
        Images written of each split.

    Raises:
        ValueError: a sprite and its labels do not belong together.
    """
    written = {}
    for split in ("train", "test"):
        described = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
        classes, labels = described["classes"], described["labels"]
        rows = np.asarray(Image.open(folder / f"{split}.png").convert("RGB"))
        if rows.shape != (len(labels), SIDE * SIDE, 3):
            raise ValueError(
                f"{split}.png must be {len(labels)} rows of {SIDE * SIDE} pixels, as many as {split}.json has "
                f"labels; got {rows.shape[0]} rows of {rows.shape[1]}"
            )
        for name in classes:
            (out / split / name).mkdir(parents=True, exist_ok=True)
        for row, (pixels, label) in enumerate(zip(rows, labels, strict=True)):
            image = Image.fromarray(pixels.reshape(SIDE, SIDE, 3))
            image.save(out / split / classes[label] / f"{row:05d}.png")
        table = "".join(f"{name}\t{index}\n" for index, name in enumerate(classes))
        (out / "classes.tsv").write_text(table, encoding="utf-8")
        written[split] = len(labels)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("out", type=Path, metavar="OUT")
    given = parser.parse_args()
    for split, count in unpack(given.folder, given.out).items():
        print(f"{split}: {count} images in {given.out / split}")
