"""Opening a file that may be anything: a pipe or a device in its place must not keep the reader waiting."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path) -> BufferedReader:
    """Opens a file for reading, and only a file; links are followed.

    Raises:
        OSError: there is none, it cannot be opened, or it is a folder, pipe, socket or device.
    """
    # without O_NONBLOCK, opening a pipe waits until someone writes into it
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")
