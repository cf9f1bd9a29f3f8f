"""Runs a script with the network forbidden: any look-up or connection ends the process with ``BROKEN``.

    python offline.py SCRIPT ARGUMENTS...

An audit hook cannot be taken out again, holds in threads, and is inherited by forked workers.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

BROKEN = 97
_LOOK_UPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}
_TALK = {"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"}


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    # a Unix socket has a path: this machine only; without an address it goes where `connect` was asked for
    local = event in _TALK and (arguments[1] is None or isinstance(arguments[1], str | bytes))
    if (event in _LOOK_UPS or event in _TALK) and not local:
        os.write(2, f"network used: {event} {arguments[1:] if event in _TALK else arguments}\n".encode())
        os._exit(BROKEN)  # not an exception: someone might catch it and go on


if __name__ == "__main__":
    sys.addaudithook(forbid)
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # noqa: PTH100, PTH120 (as for a script of its own)
    runpy.run_path(sys.argv[0], run_name="__main__")
