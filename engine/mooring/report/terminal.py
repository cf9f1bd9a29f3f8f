"""Where words for people go: they may have nobody to read them any more, and a run goes on without."""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from typing import TextIO, cast


class _Patient(io.TextIOBase):
    """A stream that takes what is written to it also when its terminal or pipe is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def stderr() -> TextIO:
    """``sys.stderr`` as it is now, which never fails."""
    return cast(TextIO, _Patient(sys.stderr))
