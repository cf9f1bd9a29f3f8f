"""What a process of a run leaves for the agent that started it: signs of life, and how it ended.

Small files in a folder of this machine that the environment names; without one nothing is left. Times are of
the machine's monotonic clock, which all its processes read alike. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = "MOORING_SIGNS"


@dataclass(frozen=True, slots=True)
class Alive:
    """What a rank said last.

    Attributes:
        rank, process: who.
        phase, step: what it was doing.
        quiet: seconds without a move when it spoke.
        allowed: seconds without a word, or a move, that are a hang; None: it may be silent.
        spoke: when.
    """

    rank: int
    process: int
    phase: str
    step: int
    quiet: float
    allowed: float | None
    spoke: float


@dataclass(frozen=True, slots=True)
class Ended:
    """How a rank ended, where it could still say so: its exit code and last sentence."""

    rank: int
    process: int
    code: int
    text: str
    spoke: float


def alive(rank: int, phase: str, step: int, quiet: float, allowed: float | None) -> None:
    """Says that this process lives."""
    _leave(f"alive-{rank}", asdict(Alive(rank, os.getpid(), phase, step, quiet, allowed, time.monotonic())))


def ended(code: int, text: str, *, rank: int | None = None) -> None:
    """Says how this process ends; before it does."""
    number = rank if rank is not None else _rank()
    _leave(f"ended-{number}", asdict(Ended(number, os.getpid(), code, text, time.monotonic())))


def read(folder: Path) -> tuple[list[Alive], list[Ended]]:
    """All that was left in a folder, by rank; endings only of those that were not heard afterwards."""
    living: list[Alive] = []
    over: list[Ended] = []
    for file in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):  # being replaced
            told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if file.name.startswith("alive-"):
                living.append(Alive(**told))
            else:
                over.append(Ended(**told))
    # one that reported a hang, and then went on
    over = [
        end
        for end in over
        if not any(sign.process == end.process and sign.spoke > end.spoke for sign in living)
    ]
    return sorted(living, key=lambda sign: sign.rank), sorted(over, key=lambda sign: sign.rank)


def _rank() -> int:
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def _leave(name: str, told: dict[str, Any]) -> None:
    """A file, whole or not at all. A training does not end because it could not say that it lives."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    with contextlib.suppress(OSError):
        part = Path(folder) / f".{name}-{os.getpid()}"
        part.write_text(json.dumps(told), encoding="utf-8")
        part.replace(Path(folder) / f"{name}.json")
