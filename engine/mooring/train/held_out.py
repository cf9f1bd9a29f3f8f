"""The images that general discrimination is measured on: of classes kept out of the run, and of the source task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from mooring.config.method_settings import CombinedSettings
from mooring.config.schema import RunConfig
from mooring.config.soft_settings import SoftFineTuningSettings
from mooring.data.class_split import all_splits
from mooring.data.manifest import Manifest, Split
from mooring.data.scan import Progress
from mooring.data.source import EpochSource
from mooring.data.source_task import source_split
from mooring.errors import ConfigError, DataError
from mooring.methods.base import Method
from mooring.models.pretrained_head import pretrained_head
from mooring.train.discrimination import SHOTS
from mooring.train.extra_tests import open_for_evaluation


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What is measured after each epoch where ``report.discrimination``.

    Attributes:
        unseen: images of classes that the run is not about; None: there are none.
        source: validation images of the task that the weights were trained for; None: there are none.
        source_head: features to logits of that task: the method's, trained or not, else the one of the weights.
    """

    unseen: EpochSource | None
    source: EpochSource | None
    source_head: nn.Linear | None

    def close(self) -> None:
        """Stops the background work of both sources."""
        for source in (self.unseen, self.source):
            if source is not None:
                source.close()


def open_held_out(
    config: RunConfig,
    everything: Manifest,
    unseen: Manifest | None,
    method: Method,
    *,
    opened: Callable[[Path], Manifest],
    tested: Callable[[Split], EpochSource],
    progress: Progress | None = None,
) -> HeldOut:
    """Opens what ``report.discrimination`` is measured on.

    Args:
        config: of the run.
        everything: the run's data, with the classes that are kept out of it.
        unseen: those of its images that are; None: there are none.
        method: of the run.
        opened: the manifest of a data path, with a validation split.
        tested: batches of some images, prepared as at test time.
        progress: called with (done, total) files while they are scanned.

    Raises:
        MooringError: there is nothing to measure on, or it does not fit.
    """
    rows = None if unseen is None else all_splits(unseen)
    if config.report.unseen is not None:
        rows = _other_images(config, everything, config.report.unseen, progress)
    if rows is not None:
        large = int((np.bincount(rows.labels) > SHOTS).sum())
        if large < 2:
            raise DataError(
                f"report.discrimination: expected two classes that the run is not about with more than {SHOTS} images; "
                f"got {large}"
            )
    source, head = _source_task(config, everything, method, opened)
    if rows is None and source is None:
        raise ConfigError(
            "report.discrimination=true needs classes that the run is not about (data.unseen_classes=N, data.classes="
            "[...] or report.unseen=DIR), or images of the task of the weights (report.source=DIR)"
        )
    return HeldOut(
        None if rows is None else tested(rows),
        None if source is None else tested(source),
        head,
    )


def _other_images(config: RunConfig, everything: Manifest, path: Path, progress: Progress | None) -> Split:
    """All images of ``report.unseen``; none of them may be the run's."""
    rows = all_splits(open_for_evaluation(config.data, path, None, progress))
    own = _digests(everything)
    if shared := sum(digest in own for digest in rows.sha256):
        raise DataError(
            f"report.unseen: expected images of classes that the run is not about; {shared} of the {len(rows)} in "
            f"{path} are images of the run's data (data.unseen_classes=N keeps classes of that out of the run)"
        )
    return rows


def _source_task(
    config: RunConfig, everything: Manifest, method: Method, opened: Callable[[Path], Manifest]
) -> tuple[Split | None, nn.Linear | None]:
    """Validation images of the source task without the run's own images, and the head that answers."""
    path, table = config.report.source, config.report.source_classes
    parts = config.method.parts if isinstance(config.method, CombinedSettings) else (config.method,)
    for part in parts:
        if path is None and isinstance(part, SoftFineTuningSettings):
            path, table = part.source_data, part.source_classes
    if path is None:
        return None, None
    kept = [getattr(module, "source_head", None) for module in method.modules()]
    head = next((own for own in kept if isinstance(own, nn.Linear)), None)
    if head is None:
        head = pretrained_head(config.model.name, method.head.in_features, weights=config.model.weights)
        head.to(method.head.weight.device)
    rows = source_split(
        opened(path), head.out_features, classes_file=table, split="val", without=_digests(everything)
    )
    return rows, head


def _digests(manifest: Manifest) -> set[str]:
    return {str(digest) for digest in manifest.table["sha256"].to_pylist()}
