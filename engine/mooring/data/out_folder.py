"""The folder a scan writes to: checked before an hour of decoding, not after, and not left behind empty."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mooring.data.manifest import scanned_path
from mooring.errors import RunFolderError


@contextmanager
def writable(out: Path, source: Path) -> Iterator[None]:
    """Makes the folder ``out`` for the scan of ``source``; what it made is removed if the body fails.

    Raises:
        RunFolderError: the folder cannot be written, lies where the scan would read it again, or holds the
            scan of another source.
    """
    _check_place(out, source)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        _check_writable(out)
        yield
    except BaseException:
        if out in made:  # then everything in it was written by the scan that failed
            shutil.rmtree(out, ignore_errors=True)
        with suppress(OSError):  # a folder that is no longer empty belongs to someone else
            for folder in made:
                if folder.exists():
                    folder.rmdir()
        raise


def _check_place(out: Path, source: Path) -> None:
    inner, outer = out.resolve(), source.resolve()
    inside = source.is_dir() and inner.is_relative_to(outer)
    # hidden folders are not listed, so a cache below the home folder is no harm
    if inside and not any(part.startswith(".") for part in inner.relative_to(outer).parts):
        raise RunFolderError(
            f"expected an output folder outside the images; got {out} inside {source}: give another out"
        )
    before = scanned_path(out)
    if before is not None and before != str(outer):
        raise RunFolderError(
            f"expected a new folder, or that of an earlier scan of {source}; {out} holds the scan of {before}: "
            "choose another out"
        )


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".write-test"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as err:
        raise RunFolderError(f"cannot write to {out}: {err.strerror or err}: give another folder") from None
