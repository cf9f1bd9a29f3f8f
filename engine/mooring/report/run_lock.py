"""One process at a time trains in a run folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from mooring.errors import RunFolderError
from mooring.parsing import parse_json
from mooring.regular_file import open_own, read_regular

LOCK = ".lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@dataclass(slots=True)
class _Held:
    descriptor: int
    holders: int = 1


_guard = threading.Lock()
_held: dict[tuple[int, int], _Held] = {}  # (device, inode) of the lock file


class RunLock:
    """The lock of a run folder, taken when this returns.

    It is the kernel's (flock): gone when the process is, also by SIGKILL. Several holders in one process share it.
    The file ``RUN/.lock`` stays, and says who holds the lock; it is empty where nobody does.

    Args:
        run: the folder.

    Attributes:
        problem: why there is no lock, where the file system has none; None: it is held.

    Raises:
        RunFolderError: another process holds it.
        OSError: the file cannot be written.
    """

    def __init__(self, run: Path) -> None:
        self.problem: str | None = None
        self._key: tuple[int, int] | None = None
        descriptor = open_own(run / LOCK, os.O_RDWR | os.O_CREAT)
        try:
            facts = os.fstat(descriptor)
            key = facts.st_dev, facts.st_ino
            with _guard:
                if key in _held:
                    _held[key].holders += 1
                    self._key = key
                    return
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _held[key] = _Held(descriptor)
                self._key = key
                _say_who(descriptor)
                descriptor = -1
        except OSError as err:
            if self._key is not None:  # only the words could not be written
                descriptor = -1
            elif err.errno in _TAKEN:
                raise RunFolderError(_in_use(run)) from None
            else:
                self.problem = (
                    f"{run}: its file system has no locks ({err.strerror}): see to it that no other process continues "
                    "this run at the same time"
                )
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def release(self) -> None:
        """Gives the lock back; may be called twice."""
        with _guard:
            if self._key is None or self._key not in _held:  # the latter in a forked child
                return
            held = _held[self._key]
            held.holders -= 1
            if held.holders == 0:
                del _held[self._key]
                with contextlib.suppress(OSError):
                    os.ftruncate(held.descriptor, 0)
                os.close(held.descriptor)
            self._key = None


def _say_who(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    told = {
        "host": platform.node(),
        "process": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    os.pwrite(descriptor, (json.dumps(told) + "\n").encode(), 0)


def _in_use(run: Path) -> str:
    try:
        told = parse_json(read_regular(run / LOCK))
        number, since = int(told["process"]), told["since"]
        who = f"process {number} on {told['host']}, since {since}"
        stop = f"end it there with  kill {number}  (it saves its state first)"
    except (OSError, ValueError, KeyError, TypeError):  # it has not said so yet
        who, stop = "another process", "end it"
    return f"{run} is being trained by {who}: wait for it, {stop}, or start another run with out=FOLDER"


def _let_go_in_the_child() -> None:
    """A worker that outlives its process must not keep the lock."""
    global _guard
    _guard = threading.Lock()
    for held in _held.values():
        os.close(held.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_the_child)
