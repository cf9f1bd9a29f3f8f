"""Test sets beside the run's own, such as the same classes drawn, painted or photographed elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mooring.config.schema import DataSettings
from mooring.data.cache import open_manifest
from mooring.data.manifest import Manifest, Split
from mooring.data.scan import Progress
from mooring.errors import DataError
from mooring.models.weights import cache_folder


def open_for_evaluation(
    data: DataSettings, path: Path, classes: Sequence[str] | None, progress: Progress | None = None
) -> Manifest:
    """The manifest of images that no run was trained on.

    Args:
        data: how the run reads its images.
        path: image folder, list or manifest; images without a split are all ``test``.
        classes: of the run, whose numbers the labels get; None: the images have classes of their own.
        progress: called with (done, total) files while they are scanned.

    Raises:
        DataError: there is nothing to read, or a class that the run does not know.
    """
    return open_manifest(
        path,
        cache_folder() / "manifests",
        workers=data.workers,
        max_pixels=data.max_pixels,
        image_column=data.image_column,
        label_column=data.label_column,
        split_column=data.split_column,
        for_evaluation=True,
        classes=classes,
        progress=progress,
    )


def measured_split(manifest: Manifest) -> Split:
    """The images to measure on: ``test`` where there is one, else ``val``, else ``train``."""
    return manifest.split(next(name for name in ("test", "val", "train") if name in manifest.counts))


def open_extra_tests(
    data: DataSettings, classes: Sequence[str], progress: Progress | None = None
) -> dict[str, Split]:
    """The rows of every ``data.extra_test``, by name.

    Raises:
        DataError: one cannot be used; names it.
    """
    found = {}
    for name, path in data.extra_test.items():
        try:
            found[name] = measured_split(open_for_evaluation(data, path, classes, progress))
        except DataError as err:
            raise DataError(f"data.extra_test.{name}: {err}") from None
    return found
