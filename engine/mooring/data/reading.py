"""A manifest row's bytes, checked against what the scan saw."""

from __future__ import annotations

import hashlib
import os

from PIL import Image

from mooring.data.images import decode_rgb
from mooring.data.manifest import Split
from mooring.data.quarantine import ImageProblem
from mooring.errors import DataError
from mooring.regular_file import open_regular

_REMEDY = "restore it, or scan the data again"


def read_row(split: Split, row: int) -> bytes:
    """The file of a row.

    Size and time are compared with the scan's, and where the time differs (a copied data set) the
    sha256; so an unchanged data set costs one ``fstat`` per image.

    Raises:
        DataError: the file is gone, or is not the one that was scanned.
    """
    file = split.file(row)
    expected = int(split.byte_counts[row])
    try:
        with open_regular(file) as stream:
            facts = os.fstat(stream.fileno())
            data = stream.read(expected + 1)  # whatever stands there now, no more than was scanned
    except OSError as err:
        raise DataError(f"cannot read {file}, which the scan found: {err.strerror}: {_REMEDY}") from None
    if len(data) != expected:
        got = facts.st_size if facts.st_size != expected else len(data)
        raise DataError(f"expected {expected} bytes in {file}, as scanned; got {got}: {_REMEDY}")
    if facts.st_mtime_ns != split.mtimes[row] and hashlib.sha256(data).hexdigest() != split.sha256[row]:
        raise DataError(f"expected the picture that was scanned in {file}; got other bytes: {_REMEDY}")
    return data


def decode_row(split: Split, row: int, data: bytes) -> Image.Image:
    """The upright RGB picture of a row.

    Raises:
        DataError: the bytes no longer decode to the size that was scanned.
    """
    file = split.file(row)
    width, height = split.sizes[row]
    try:
        image = decode_rgb(data, int(width) * int(height))
    except ImageProblem as problem:
        raise DataError(f"cannot decode {file}, which the scan could ({problem}): {_REMEDY}") from None
    if image.size != (width, height):
        raise DataError(
            f"expected {width} x {height} pixels in {file}, as scanned; got {image.width} x {image.height}: "
            f"{_REMEDY}"
        )
    return image
