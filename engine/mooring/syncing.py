"""What is on the disk when a call returns: contents, names, and the folders that hold them."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents where they are missing; each new name is on the disk when this returns.

    Raises:
        OSError: it cannot be made.
    """
    missing = []
    for folder in (path, *path.parents):
        if folder.is_dir():
            break
        missing.append(folder)
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def replace_durably(fresh: Path, path: Path) -> None:
    """Gives a whole new file the name of an old one: whenever the machine stops, one of the two is there whole."""
    sync(fresh)
    fresh.replace(path)
    sync(path.parent)
