"""A manifest for any data path: loaded where it is one, scanned once where it is not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mooring.data.columns import Columns
from mooring.data.discover import Discovered
from mooring.data.embedded import image_column as find_image_column
from mooring.data.manifest import VERSION, Manifest
from mooring.data.scan import MAX_PIXELS, Duplicates, Progress, check_arguments, discover, scan, source_path
from mooring.errors import DataError, RunFolderError


def open_manifest(
    path: Path | str,
    cache_dir: Path,
    *,
    val_fraction: float = 0.15,
    seed: int = 0,
    workers: int = 2,
    max_pixels: int = MAX_PIXELS,
    duplicates: Duplicates = "drop",
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    for_evaluation: bool = False,
    classes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """The manifest of a data path.

    A manifest folder is loaded and checked. Anything else is scanned into a folder of ``cache_dir`` that is
    named by the path, the settings and the listing (names, sizes, times), so a second run over unchanged
    files decodes nothing. Safe to call from several processes at once.

    Args: as ``scan``. A manifest folder keeps its splits; with ``for_evaluation`` its labels are mapped
    onto ``classes``.

    Raises:
        DataError: as ``scan`` and ``Manifest.load``.
        RunFolderError: the cache cannot be written.
    """
    check_arguments(val_fraction, seed, for_evaluation, classes)
    path = source_path(path)
    if path.is_dir() and Manifest.is_manifest(path):
        manifest = Manifest.load(path)
        return manifest if classes is None else manifest.with_classes(classes)
    settings: dict[str, Any] = {
        "val_fraction": val_fraction,
        "seed": seed,
        "max_pixels": max_pixels,
        "duplicates": duplicates,
        "image_column": image_column,
        "label_column": label_column,
        "split_column": split_column,
        "for_evaluation": for_evaluation,
        "classes": None if classes is None else list(classes),
    }
    folder = cache_dir / f"{path.resolve().name or 'data'}-{_key(path, settings)}"
    if Manifest.is_manifest(folder):
        try:
            return Manifest.load(folder)
        except DataError:
            shutil.rmtree(folder, ignore_errors=True)  # our own cache, damaged: make it again
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache_dir))
    except OSError as err:
        raise RunFolderError(
            f"cannot write to {cache_dir}: {err.strerror}: give another cache folder"
        ) from None
    try:
        scan(path, out=part, workers=workers, progress=progress, **settings)
        try:
            part.rename(folder)
        except OSError:
            if not Manifest.is_manifest(folder):  # else another process was first, with the same result
                raise
    except OSError as err:
        raise RunFolderError(
            f"cannot write to {cache_dir}: {err.strerror}: give another cache folder"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Manifest.load(folder)


def _key(path: Path, settings: dict[str, Any]) -> str:
    total = hashlib.sha256(json.dumps([VERSION, str(path.resolve()), settings], sort_keys=True).encode())
    columns = Columns(settings["image_column"], settings["label_column"], settings["split_column"])
    embedded = path.suffix.lower() == ".parquet" and path.is_file() and find_image_column(path, columns.image)
    if path.is_file():
        total.update(_stamp(path))
    if not embedded:
        _add_listing(total, discover(path, columns, None, needs_train=not settings["for_evaluation"]))
    return total.hexdigest()[:16]


def _add_listing(total: Any, found: Discovered) -> None:
    for candidate in found.candidates:
        total.update(json.dumps([candidate.path, candidate.label, candidate.split]).encode())
        total.update(_stamp(found.root / candidate.path))
    for row in found.quarantined:
        total.update(json.dumps([row.path, row.reason]).encode())


def _stamp(file: Path) -> bytes:
    try:
        facts = os.stat(file)  # noqa: PTH116 (a folder may hold millions of files)
    except OSError:
        return b"missing"
    return f"{facts.st_size}:{facts.st_mtime_ns}".encode()
