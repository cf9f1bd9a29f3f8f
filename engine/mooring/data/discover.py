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
# what this project writes: a scan's folder, a run's folder
_OWN_FOLDERS = (("manifest.json", "manifest.parquet"), ("config.toml", "metrics.jsonl"))
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
    """Everything a source names, in listing order.

    Attributes:
        splits_given: the source says which image belongs to which split; else all stand in train.
    """

    root: Path
    kind: str
    candidates: list[Candidate] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    splits_given: bool = False


def discover_folder(source: Path, *, needs_train: bool = True) -> Discovered:
    """Lists ``class/image`` or ``train|val|test/class/image``.

    A folder is read by splits where one of its subfolders is named like the training split and holds
    folders, not images. Files deeper than ``class/image`` take the class of their first folder.
    Names are sorted by code point, so that the listing is the same on every file system.

    Args:
        source: the folder.
        needs_train: whether split folders without a training split are refused.

    Raises:
        DataError: neither layout is there, or a class folder cannot be listed.
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
    only_splits = bool(by_split) and len(by_split) == len(folders)
    named = [by_split["train"]] if "train" in by_split else folders if only_splits and not needs_train else []
    if any(is_dir for name in named for _, is_dir in _entries(root / name)):
        found.splits_given = True
        others = [name for name in folders if name not in by_split.values()]
        if others:
            found.notes.append(f"folders beside the splits were not read: {_some(others)}")
        for split in SPLITS:
            if split in by_split:
                _read_classes(found, by_split[split], split)
    elif needs_train and "train" not in by_split and only_splits:
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
    _check_depth(found, source, needs_train)
    return found


def _check_depth(found: Discovered, source: Path, needs_train: bool) -> None:
    """Refuses a folder too high up, where the folders above the classes would be taken for the classes."""
    images = [item for item in found.candidates if item.path.lower().endswith(IMAGE_SUFFIXES)]
    own_depth = 2 if found.splits_given else 1
    deep = [item for item in images if item.path.count("/") > own_depth]
    one_class = needs_train and len({item.label for item in images}) == 1
    if not deep or not (one_class or 2 * len(deep) > len(images)):
        return
    places = {_place_of_classes(item.path) for item in deep}
    if len(places) == 1 and not found.splits_given:
        place, below = places.pop()
        raise DataError(
            f"expected {source}/<class>/<image>; the images lie at {source / place}/{below}: "
            f"give data={source / place}"
        )
    raise DataError(
        f"expected class/image; got {len(deep)} of {len(images)} images deeper, as {deep[0].path} in {source}, "
        f"which would be of class {deep[0].label!r}: move each class's images into one folder, or give a list "
        "(CSV with the columns path and label)"
    )


def _place_of_classes(image: str) -> tuple[str, str]:
    """The folder that holds the class folders, or the split folders above those; and what lies in it."""
    place = image.rsplit("/", 2)[0]
    above, _, name = place.rpartition("/")
    if above and name.lower() in SPLIT_NAMES:
        return above, "<split>/<class>"
    return place, "<class>"


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
        if not above:  # a whole class would be gone without a word
            raise DataError(
                f"cannot list the class folder {found.root / relative}: {err.strerror or err}: make it readable, "
                "or take it out"
            ) from None
        found.quarantined.append(Quarantined(relative, Reason.UNREADABLE, err.strerror or str(err)))
        return
    if _is_own(entries):
        found.notes.append(f"{relative} was written by mooring (a scan or a run) and was not read")
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


def _is_own(entries: list[tuple[str, bool]]) -> bool:
    files = {name for name, is_dir in entries if not is_dir}
    return any(files.issuperset(marks) for marks in _OWN_FOLDERS)


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
