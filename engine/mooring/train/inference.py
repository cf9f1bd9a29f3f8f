"""A finished run as a classifier of files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

import mooring.models.cifar_resnet  # noqa: F401  registers what timm lacks
from mooring.config.load import load_config
from mooring.config.schema import RunConfig
from mooring.data.augment import Augmentation, ModelInput, evaluation
from mooring.data.decoding_cost import check_file_size
from mooring.data.draws import draw
from mooring.data.images import decode_rgb
from mooring.data.manifest import Manifest, Split
from mooring.data.quarantine import ImageProblem
from mooring.data.render import render
from mooring.data.sources import make_source
from mooring.errors import DataError, RunFolderError
from mooring.models.front_door import with_front_door
from mooring.models.torchvision_shim import import_timm
from mooring.parsing import parse_json
from mooring.regular_file import open_regular, read_regular
from mooring.report.run_folder import existing_run
from mooring.train.evaluate import EvalResult, evaluate
from mooring.train.extra_tests import measured_split, open_for_evaluation
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

    def predict_files(self, paths: Sequence[Path]) -> list[list[tuple[str, float]]]:
        """For each file all classes with their probability, the most likely first.

        Raises:
            DataError: a file is missing or no image; names it.
        """
        return [ranked for _, ranked in self.predict_each(paths)]

    def predict_each(
        self, paths: Iterable[Path], unreadable: Callable[[Path, DataError], None] | None = None
    ) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
        """Each file with all classes and their probability, the most likely first, as soon as it is known.

        Args:
            paths: image files; read a batch at a time.
            unreadable: called with a file that is missing or no image, and what is wrong with it; that file
                gives no result. An error that it raises ends the iteration after the results before it.
                None: raise.

        Raises:
            DataError: a file is missing or no image, and ``unreadable`` is None.
        """
        for batch in _batches(paths):
            kept: list[Path] = []
            pictures: list[np.ndarray] = []
            refused: DataError | None = None
            for path in batch:
                try:
                    picture = self._prepared(path)
                except DataError as problem:
                    try:
                        if unreadable is None:
                            raise
                        unreadable(path, problem)
                    except DataError as err:
                        refused = err
                        break
                else:
                    kept.append(path)
                    pictures.append(picture)
            if pictures:
                yield from zip(kept, self._ranked(pictures), strict=True)
            if refused is not None:
                raise refused

    @torch.inference_mode()
    def _ranked(self, pictures: Sequence[np.ndarray]) -> list[list[tuple[str, float]]]:
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        images = images.contiguous(memory_format=torch.channels_last)
        shares = self.model(images.to(self.device)).float().softmax(1).cpu()
        order = shares.argsort(dim=1, descending=True, stable=True)
        return [
            [(self.classes[c], row[c]) for c in classes]
            for row, classes in zip(shares.tolist(), order.tolist(), strict=True)
        ]

    def _prepared(self, path: Path) -> np.ndarray:
        """[S, S, 3] float32, prepared as validation images are."""
        limit = self.config.data.max_pixels
        try:
            with open_regular(path) as stream:
                check_file_size(os.fstat(stream.fileno()).st_size, limit)
                image = decode_rgb(stream.read(), limit)
        except OSError as err:
            raise DataError(f"cannot read {path}: {err.strerror}") from None
        except ImageProblem as problem:
            raise DataError(f"cannot decode {path}: {problem}") from None
        sizes = np.asarray([image.size], dtype=np.int64)
        return render(
            image, self.augment, draw(self.augment, sizes, np.zeros(1, np.int64), seed=0, epoch=0), 0
        )

    def evaluation_split(self, data: Path | None = None, split: str | None = None) -> Split:
        """The images that ``evaluate`` measures on.

        Args:
            data: image folder, list or manifest, with no other classes than the run's; images without a split
                are all ``test``. None: the images recorded in the run folder.
            split: ``train``, ``val`` or ``test``; None: ``test`` where there is one, else ``val``.

        Raises:
            DataError: there is no such split, or the classes differ.
        """
        if data is None:
            manifest = Manifest.load(self.run / "manifest")
        else:
            manifest = open_for_evaluation(self.config.data, data, self.classes)
        if list(manifest.classes) != self.classes:
            differing = sorted(set(self.classes) ^ set(manifest.classes))
            raise DataError(
                f"the run knows {len(self.classes)} classes, {data or self.run / 'manifest'} has "
                f"{len(manifest.classes)}; these are in one only: {', '.join(differing[:10])}: "
                "give data with the run's classes"
            )
        return measured_split(manifest) if split is None else manifest.split(split)

    def evaluate(self, data: Path | None = None, split: str | None = None) -> EvalResult:
        """Metrics on a split of the run's own data, or of another data set with the same classes.

        Args, raises: as ``evaluation_split``.
        """
        return self.evaluate_split(self.evaluation_split(data, split))

    def evaluate_split(self, rows: Split) -> EvalResult:
        """Metrics on the images of a split whose labels are this run's classes."""
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


def _batches(paths: Iterable[Path]) -> Iterator[list[Path]]:
    remaining = iter(paths)
    while batch := list(islice(remaining, _BATCH)):
        yield batch


def load_run(run: Path) -> Predictor:
    """The predictor of a run folder.

    Raises:
        RunFolderError: it is no run folder, it holds no exported model yet, or a damaged one.
    """
    folder = existing_run(run)
    exported = run / "model"
    config = load_config(folder.path / "config.toml", [])
    device = choose_device("auto")
    try:
        described = parse_json(read_regular(exported / "config.json"))
        for file in exported.iterdir():  # timm opens what it finds there
            open_regular(file).close()
        classes = [str(name) for name in described["label_names"]]
        augment = evaluation(ModelInput.from_model_config(described["pretrained_cfg"]))
        model = import_timm().create_model(f"local-dir:{exported}", pretrained=True)
        width = getattr(model, "num_classes", len(classes))
        if width != len(classes):
            raise ValueError(f"{len(classes)} class names, but a model of {width} classes")
        model = with_front_door(model, exported, described.get("mooring", {})).eval().to(device)
    except FileNotFoundError as err:
        if (exported / "config.json").is_file():
            raise _damaged(run, err) from err
        raise RunFolderError(
            f"{run}: expected an exported model in {exported}, got none: the run stopped before its first epoch "
            f"ended; continue it with  mooring train --resume {run}"
        ) from None
    except Exception as err:  # timm, torch, safetensors and JSON share no base class
        if isinstance(err, torch.OutOfMemoryError):
            raise
        raise _damaged(run, err) from err
    return Predictor(run, config, model, classes, augment, device)


def _damaged(run: Path, err: Exception) -> RunFolderError:
    reason = (str(err).strip() or "no message").splitlines()[0]
    return RunFolderError(
        f"{run / 'model'}: the exported model is damaged ({type(err).__name__}: {reason}): train again, or "
        f"continue the run with  mooring train --resume {run}"
    )
