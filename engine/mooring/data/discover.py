"""Image folders -> candidates: which files there are, with label and split, before any is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mooring.data.quarantine import Quarantined, Reason
from mooring.errors import DataError

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pnm")
# left behind by file managers and archivers in places where every file is taken for an image
_LITTER = ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that may become a manifest row.

    Attributes:
        path: relative to the root, with forward slashes.
        label: class name.
        split: ``train``, ``val`` or ``test``.
        listed_as: what to call it in the quarantine list.
    """

    path: str
    label: str
    split: str
    listed_as: str


@dataclass(slots=True)
class Discovered:
    """Everything a source names, in listing order."""

    root: Path
    kind: str
    candidates: list[Candidate] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def discover_folder(source: Path) -> Discovered:
    """Lists ``class/image`` or ``train|val|test/class/image``.

    A folder is read by splits where one of its subfolders is named like the training split and holds
    folders, not images. Files deeper than ``class/image`` take the class of their first folder.
    Names are sorted by code point, so that the listing is the same on every file system.

    Raises:
        DataError: neither layout is there.
    """
    root = source.resolve()
    found = Discovered(root, "image folder")
    folders = [name for name, is_dir in _entries(root) if is_dir]
    by_split: dict[str, str] = {}
    for name in folders:
        split = SPLIT_NAMES.get(name.lower())
        if split is None:
            continue
        if split in by_split:
            raise DataError(
                f"expected one folder for the {split} split in {source}; got {by_split[split]!r} and "
                f"{name!r}: rename or move one of them"
            )
        by_split[split] = name
    if "train" in by_split and any(is_dir for _, is_dir in _entries(root / by_split["train"])):
        others = [name for name in folders if name not in by_split.values()]
        if others:
            found.notes.append(f"folders beside the splits were not read: {_some(others)}")
        for split in SPLITS:
            if split in by_split:
                _read_classes(found, by_split[split], split)
    elif "train" not in by_split and by_split and len(by_split) == len(folders):
        raise DataError(
            f"expected a train folder beside {_some(list(by_split.values()))} in {source}; got none: "
            "name the folder with the training images 'train'"
        )
    else:
        if not folders:
            loose = sum(not is_dir for _, is_dir in _entries(root))
            raise DataError(
                f"expected {source}/<class>/<image> or {source}/train/<class>/<image>; got a folder with "
                f"{loose} files and no subfolder: put the images of each class into a folder of its own"
            )
        _read_classes(found, "", "train")
    return found


def _read_classes(found: Discovered, prefix: str, split: str) -> None:
    folder = found.root / prefix
    loose = [
        name for name, is_dir in _entries(folder) if not is_dir and name.lower().endswith(IMAGE_SUFFIXES)
    ]
    if loose:
        found.notes.append(
            f"{len(loose)} images directly in {prefix or '.'}/ have no class and were not read"
        )
    deep = 0
    for name, is_dir in _entries(folder):
        if not is_dir:
            continue
        class_path = f"{prefix}/{name}" if prefix else name
        if not _is_text(name):
            found.quarantined.append(
                Quarantined(class_path, Reason.BAD_NAME, "the folder's name is not UTF-8")
            )
            continue
        empty = True
        for path in _walk(found, class_path, ()):
            empty = False
            deep += path.count("/") > class_path.count("/") + 1
            if _is_text(path):
                found.candidates.append(Candidate(path, name, split, path))
            else:
                found.quarantined.append(Quarantined(path, Reason.BAD_NAME, "the name is not UTF-8"))
        if empty:
            found.notes.append(f"class {name!r} has no files in {prefix or split}")
    if deep:
        found.notes.append(
            f"{deep} files lie deeper than class/image and take the class of their first folder"
        )


def _walk(found: Discovered, relative: str, above: tuple[str, ...]) -> Iterator[str]:
    """Files below a folder; links are followed as long as they stay under the root and make no circle."""
    real = os.path.realpath(found.root / relative)
    if real in above:
        return
    if not is_under(real, found.root):
        found.quarantined.append(Quarantined(relative, Reason.SYMLINK_OUTSIDE, f"leads to {real}"))
        return
    try:
        entries = _entries(found.root / relative)
    except OSError as err:
        found.quarantined.append(Quarantined(relative, Reason.UNREADABLE, err.strerror or str(err)))
        return
    for name, is_dir in entries:
        path = f"{relative}/{name}"
        if is_dir:
            yield from _walk(found, path, (*above, real))
            continue
        target = os.path.realpath(found.root / path) if (found.root / path).is_symlink() else None
        if target is not None and not is_under(target, found.root):
            found.quarantined.append(Quarantined(path, Reason.SYMLINK_OUTSIDE, f"leads to {target}"))
        else:
            yield path


def is_under(real: str, root: Path) -> bool:
    """Whether a resolved path is the root or lies below it."""
    return real == str(root) or real.startswith(str(root).rstrip(os.sep) + os.sep)


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """(name, leads to a folder), sorted by code point; hidden files and known litter are skipped."""
    with os.scandir(folder) as entries:
        return sorted(
            (entry.name, entry.is_dir())
            for entry in entries
            if not entry.name.startswith(".") and entry.name not in _LITTER
        )


def _is_text(name: str) -> bool:
    # bytes that are not UTF-8 come from the file system as lone surrogates, which no manifest can hold
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
