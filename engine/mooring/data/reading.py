"""A manifest row's bytes, checked against what the scan saw."""

from __future__ import annotations

import hashlib
import os

from PIL import Image

from mooring.data.images import decode_rgb
from mooring.data.manifest import Split
from mooring.data.quarantine import ImageProblem
from mooring.errors import DataError

_REMEDY = "restore it, or scan the data again"


def read_row(split: Split, row: int) -> bytes:
    """The file of a row.

    Size and time are compared with the scan's, and where the time differs (a copied data set) the
    sha256; so an unchanged data set costs one ``fstat`` per image.

    Raises:
        DataError: the file is gone, or is not the one that was scanned.
    """
    file = split.file(row)
    try:
        with file.open("rb") as stream:
            facts = os.fstat(stream.fileno())
            data = stream.read()
    except OSError as err:
        raise DataError(f"cannot read {file}, which the scan found: {err.strerror}: {_REMEDY}") from None
    expected = int(split.byte_counts[row])
    if len(data) != expected:
        raise DataError(f"expected {expected} bytes in {file}, as scanned; got {len(data)}: {_REMEDY}")
    if facts.st_mtime_ns != split.mtimes[row] and hashlib.sha256(data).hexdigest() != split.sha256[row]:
        raise DataError(f"expected the picture that was scanned in {file}; got other bytes: {_REMEDY}")
    return data


def decode_row(split: Split, row: int, data: bytes) -> Image.Image:
    """The upright RGB picture of a row.

    Raises:
        DataError: the bytes no longer decode to the size that was scanned.
    """
    file = split.file(row)
    try:
        image = decode_rgb(data)
    except ImageProblem as problem:
        raise DataError(f"cannot decode {file}, which the scan could ({problem}): {_REMEDY}") from None
    width, height = split.sizes[row]
    if image.size != (width, height):
        raise DataError(
            f"expected {width} x {height} pixels in {file}, as scanned; got {image.width} x {image.height}: "
            f"{_REMEDY}"
        )
    return image
