"""A small run by the command line, from images to predictions: train, resume, eval, predict, info.

python train_small.py IMAGES OUT SOURCE
"""

from __future__ import annotations

import sys

from mooring.cli import app


def mooring(*words: str) -> None:
    try:
        app(list(words), standalone_mode=False)
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    images, run, source = sys.argv[1:]
    mooring(
        "train", f"data={images}", f"out={run}", f"data.source={source}", "data.workers=2", "method=dr_tune",
        "method.bank_size=8", "model.name=resnet10t", "model.weights=none", "train.epochs=1", "train.batch_size=4",
        "train.image_size=32", "train.eval_size=32", "train.device=cpu", "report.progress=quiet",
    )  # fmt: skip
    mooring("train", "--resume", run, "report.progress=quiet")
    mooring("eval", run)
    mooring("predict", run, images)
    mooring("info", run)
    print("all done")
