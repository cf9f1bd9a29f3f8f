"""What Linux does for the processes of a parent that is killed: tells its children, and finds them another parent.

Standard library only: the agent starts with it in a few hundredths of a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable

_SET_CHILD_SUBREAPER, _SET_PARENT_DEATH_SIGNAL = 36, 1  # prctl(2)


def adopt_orphans() -> None:
    """Makes this process the parent of those of its descendants whose own one died."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def ended_with_its_parent() -> Callable[[], None]:
    """What a child of this thread calls between fork and exec, to get SIGTERM when this thread is gone, however."""
    parent = os.getpid()

    def in_the_child() -> None:
        _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # it was gone before that was asked for
            os.kill(os.getpid(), signal.SIGTERM)

    return in_the_child


def _prctl(option: int, value: int) -> None:
    # where this is not Linux, orphans of a killed parent are not found
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
