"""Opening files that may be anything: a pipe or device in their place keeps nobody waiting, a link leads nowhere.

A folder may come from elsewhere. What is only read may be reached over a link, since it is compared with what it should
be; what is changed must lie in the folder itself, or someone else's file would be cut or written to.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

# without O_NONBLOCK, opening a pipe waits until someone opens its other end
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def open_regular(path: Path) -> BufferedReader:
    """Opens a file for reading, and only a file; links are followed.

    Raises:
        OSError: there is none, it cannot be opened, or it is a folder, pipe, socket or device.
    """
    return os.fdopen(_regular(path, os.O_RDONLY), "rb")


def read_regular(path: Path) -> bytes:
    """The content of a file, opened as by ``open_regular``.

    Raises:
        OSError: as there.
    """
    with open_regular(path) as stream:
        return stream.read()


def open_own(path: Path, flags: int) -> int:
    """Opens a file that is to be changed; no link in its place is followed.

    Args:
        path: its folder is trusted.
        flags: of ``os.open``; a file that ``O_CREAT`` makes has the usual permissions.

    Returns:
        a descriptor, which the caller closes.

    Raises:
        OSError: it cannot be opened, or it is a link, folder, pipe, socket or device.
    """
    try:
        return _regular(path, flags | _NO_LINK)
    except OSError as err:
        if err.errno == errno.ELOOP or path.is_symlink():
            raise OSError(errno.ELOOP, f"a symbolic link to {os.path.realpath(path)}", str(path)) from None
        raise


def _regular(path: Path, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | _AT_ONCE, 0o666)
    except OSError as err:
        if err.errno == errno.ENXIO:  # a pipe that nobody reads, a socket, a device that is not there
            raise _not_regular(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return descriptor


def _not_regular(path: Path) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", str(path))
