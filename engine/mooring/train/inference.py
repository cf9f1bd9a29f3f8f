"""A finished run as a classifier of files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mooring.config.load import load_config
from mooring.config.schema import RunConfig
from mooring.data.augment import Augmentation, ModelInput, evaluation
from mooring.data.draws import draw
from mooring.data.images import decode_rgb
from mooring.data.manifest import Manifest
from mooring.data.quarantine import ImageProblem
from mooring.data.render import render
from mooring.data.sources import make_source
from mooring.errors import DataError, RunFolderError
from mooring.models.torchvision_shim import import_timm
from mooring.report.run_folder import existing_run
from mooring.train.assembly import open_data
from mooring.train.evaluate import EvalResult, evaluate
from mooring.train.precision import choose_device

_BATCH = 32


class Predictor:
    """The exported model of a run with its own preprocessing.

    Args:
        run: the run folder.
        config: its settings.
        model: images [B, 3, H, W] -> logits [B, C], in eval mode.
        classes: C names in logit order.
        augment: test-time preprocessing.
        device: where it runs.
    """

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        model: nn.Module,
        classes: Sequence[str],
        augment: Augmentation,
        device: torch.device,
    ) -> None:
        self.run = run
        self.config = config
        self.model = model
        self.classes = list(classes)
        self.augment = augment
        self.device = device

    @torch.inference_mode()
    def predict_files(self, paths: Sequence[Path]) -> list[list[tuple[str, float]]]:
        """For each file all classes with their probability, the most likely first.

        Raises:
            DataError: a file is missing or no image; names it.
        """
        ranked: list[list[tuple[str, float]]] = []
        for images in self._batches(paths):
            shares = self.model(images.to(self.device)).float().softmax(1).cpu()
            order = shares.argsort(dim=1, descending=True, stable=True)
            for row, classes in zip(shares.tolist(), order.tolist(), strict=True):
                ranked.append([(self.classes[c], row[c]) for c in classes])
        return ranked

    def _batches(self, paths: Sequence[Path]) -> Iterator[Tensor]:
        for start in range(0, len(paths), _BATCH):
            pictures = [self._prepared(path) for path in paths[start : start + _BATCH]]
            stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
            yield stacked.contiguous(memory_format=torch.channels_last)

    def _prepared(self, path: Path) -> np.ndarray:
        """[S, S, 3] float32, prepared as validation images are."""
        try:
            image = decode_rgb(path.read_bytes())
        except OSError as err:
            raise DataError(f"cannot read {path}: {err.strerror}") from None
        except ImageProblem as problem:
            raise DataError(f"cannot decode {path}: {problem}") from None
        sizes = np.asarray([image.size], dtype=np.int64)
        return render(
            image, self.augment, draw(self.augment, sizes, np.zeros(1, np.int64), seed=0, epoch=0), 0
        )

    def evaluate(self, data: Path | None, split: str) -> EvalResult:
        """Metrics on a split of the run's own data, or of another data set with the same classes.

        Args:
            data: image folder, list or manifest; None: the images recorded in the run folder.
            split: ``train``, ``val`` or ``test``.

        Raises:
            DataError: there is no such split, or the classes differ.
        """
        if data is None:
            manifest = Manifest.load(self.run / "manifest")
        else:
            manifest = open_data(self.config, path=data)
        if list(manifest.classes) != self.classes:
            missing = sorted(set(self.classes) ^ set(manifest.classes))
            raise DataError(
                f"the run knows {len(self.classes)} classes, {data} has {len(manifest.classes)}; "
                f"these are in one only: {', '.join(missing[:10])}: give data with the run's classes"
            )
        rows = manifest.split(split)
        source = make_source(
            self.config.data.source,
            rows,
            self.augment,
            batch_size=min(_BATCH, len(rows)),
            training=False,
            workers=self.config.data.workers,
            device=self.device,
        )
        try:
            return evaluate(self.model, source, len(self.classes), self.device)
        finally:
            source.close()


def load_run(run: Path) -> Predictor:
    """The predictor of a run folder.

    Raises:
        RunFolderError: it is no run folder, or it holds no exported model yet.
    """
    folder = existing_run(run)
    exported = run / "model"
    try:
        described = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(
            f"{run}: expected an exported model in {exported}, got none: the run stopped before its first epoch "
            f"ended; continue it with  mooring train --resume {run}"
        ) from None
    config = load_config(folder.path / "config.toml", [])
    device = choose_device("auto")
    model = import_timm().create_model(f"local-dir:{exported}", pretrained=True).eval().to(device)
    augment = evaluation(ModelInput.from_model_config(described["pretrained_cfg"]))
    return Predictor(run, config, model, described["label_names"], augment, device)
