"""Hostfiles: which machines, and how many processes on each."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mooring.errors import ConfigError

# A name becomes a word of a command line: one that begins with "-" would be read as an option there.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*")
_SLOTS = re.compile(r"slots=(\S*)")


@dataclass(frozen=True, slots=True)
class Host:
    """A machine and the number of processes on it; one GPU each where it has GPUs."""

    name: str
    slots: int

    @property
    def is_here(self) -> bool:
        """Whether this is the machine we run on: no ssh is needed to reach it."""
        short = socket.gethostname()
        return self.name in ("localhost", "127.0.0.1", "::1", short, short.partition(".")[0])


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a hostfile in DeepSpeed's format: a line is ``NAME slots=COUNT``; ``#`` begins a comment.

    The first host is where rank 0 runs.

    Raises:
        ConfigError: no such file, or lines that cannot be read; all of them are listed with their numbers.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"--hostfile: {path} cannot be read: {err}") from None
    return parse_hosts(text.splitlines(), origin=str(path))


def parse_hosts(lines: Sequence[str], *, origin: str) -> tuple[Host, ...]:
    """``read_hostfile`` on its lines.

    Raises:
        ConfigError: as ``read_hostfile``.
    """
    hosts: dict[str, tuple[Host, int]] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, *rest = words
        slots = _SLOTS.fullmatch(rest[0]) if len(rest) == 1 else None
        if slots is None:
            problems.append(f"line {number}: expected NAME slots=COUNT, got {line.strip()!r}")
        elif not _NAME.fullmatch(name):
            problems.append(f"line {number}: expected a host name or address, got {name!r}")
        elif not slots[1].isascii() or not slots[1].isdigit() or int(slots[1]) < 1:
            problems.append(f"line {number}: expected slots to be an integer >= 1, got {slots[1]!r}")
        elif name in hosts:
            problems.append(
                f"line {number}: {name} stands already in line {hosts[name][1]}; add up its slots"
            )
        else:
            hosts[name] = Host(name, int(slots[1])), number
    if problems:
        raise ConfigError("\n  ".join([f"{origin} is no hostfile:", *problems]))
    if not hosts:
        raise ConfigError(f"{origin} names no host: write one a line, as in  node0 slots=8")
    return tuple(host for host, _ in hosts.values())


def same_slots(hosts: Sequence[Host], *, needed_for: str) -> int:
    """The number of processes that every host has.

    Raises:
        ConfigError: they differ.
    """
    if len({host.slots for host in hosts}) > 1:
        shown = ", ".join(f"{host.name} slots={host.slots}" for host in hosts)
        raise ConfigError(
            f"{needed_for} starts equally many processes on every host; got {shown}: give all hosts the same "
            "slots, or take the DeepSpeed launcher (without --torchrun)"
        )
    return hosts[0].slots
