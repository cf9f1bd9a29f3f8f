"""Files that are on the disk when the call returns, and whose content can be checked later."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mooring.errors import RunFolderError
from mooring.regular_file import open_regular

# A piece that is hashed and written before the next one: both calls let other threads run.
_PIECE = 16 << 20


def write_durably(path: Path, content: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a new file and waits until it is on the disk.

    Args:
        path: must not exist.
        content: its bytes, piece by piece.

    Returns:
        ``size`` and ``sha256`` of what was meant to be written, not of what a disk made of it.

    Raises:
        OSError: it could not be written.
    """
    total, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for whole in content:
            view = memoryview(whole)
            for start in range(0, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                total.update(piece)
                file.write(piece)
            size += len(view)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": total.hexdigest()}


def is_absent(err: OSError) -> bool:
    """Whether no file stands in that place, or something else: no second try would find it."""
    return err.errno in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ELOOP, errno.ENXIO)


def remedy(number: int | None) -> str:
    """What can be done about an error of the system, by its number."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "free some space"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "give this process the right to read and write there"
    if number in (errno.EMFILE, errno.ENFILE):
        return "close files, or raise the limit of open ones"
    return "see to it that the file system answers"


def damage(file: Path, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with a file that ``write_durably`` described as ``expected``; None where nothing is.

    Raises:
        OSError: it is there and cannot be read just now, which says nothing about its content.
    """
    try:
        size = file.stat().st_size
        if size != expected["size"]:
            return f"{file} is damaged: expected {expected['size']} bytes, got {size}"
        with open_regular(file) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as err:
        if not is_absent(err):
            raise
        return f"{file} cannot be read ({err.strerror}), but the manifest lists it"
    if digest != expected["sha256"]:
        return f"{file} is damaged: expected sha256 {expected['sha256']}, got {digest}"
    return None


def read_checked(file: Path, expected: Mapping[str, Any]) -> bytes:
    """The content of a file that ``write_durably`` described as ``expected``.

    Raises:
        RunFolderError: it is not what was written.
    """
    try:
        with open_regular(file) as stream:
            content = stream.read(int(expected["size"]) + 1)  # of a larger one, enough to tell
            size = os.fstat(stream.fileno()).st_size
    except OSError as err:
        raise RunFolderError(f"{file} cannot be read ({err.strerror}), but the manifest lists it") from err
    if len(content) != expected["size"]:
        raise RunFolderError(
            f"{file} is damaged: expected {expected['size']} bytes, got {size}: use an earlier one"
        )
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected["sha256"]:
        raise RunFolderError(
            f"{file} is damaged: expected sha256 {expected['sha256']}, got {digest}: use an earlier one"
        )
    return content
