"""What an agent sees of the ranks on its machine, by the signs that they leave (``mooring.signs``)."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mooring import signs
from mooring.exit_codes import HUNG, USER_ERROR, gravest

# A launcher that does not start its ranks again ends well within this time after one of them.
_LAUNCHER_ENDS = 5.0  # seconds
# Beyond what a rank may be silent: its last word is as old as its period, and machines are busy.
_MARGIN = 5.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a command must be ended that runs on by itself: the exit code that it gets, and a sentence."""

    code: int
    text: str


class Overseer:
    """A folder for the signs of the ranks that one command starts. ``close`` removes it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mooring-"))
        self._failed: tuple[float, signs.Ended] | None = None  # seen when, the first of its kind

    @property
    def environment(self) -> dict[str, str]:
        """For the command."""
        return {signs.FOLDER: str(self.folder)}

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def verdict(self) -> Verdict | None:
        """Whether to end the command: a rank is stopped or deaf, or failed in a way that a restart would repeat."""
        now = time.monotonic()
        living, over = signs.read(self.folder)
        for end in over:
            if end.code == USER_ERROR and self._failed is None:
                self._failed = now, end
        if self._failed is not None and now - self._failed[0] > _LAUNCHER_ENDS:
            end = self._failed[1]
            return Verdict(USER_ERROR, f"rank {end.rank}: {end.text}")
        for sign in living:
            silent = now - sign.spoke
            if sign.allowed is None or silent <= sign.allowed + _MARGIN or _has_ended(sign, over):
                continue
            state = _state(sign.process)
            if state:  # of one that is gone its launcher tells
                return Verdict(
                    HUNG,
                    f"rank {sign.rank} (process {sign.process}) has not been heard for {silent:.0f} s, last in "
                    f"'{sign.phase}' of step {sign.step}: {state}",
                )
        return None

    def exit_code(self, code: int) -> int:
        """Of the command: launchers hide their ranks' codes behind one of their own."""
        _, over = signs.read(self.folder)
        return gravest([*(end.code for end in over), code]) if code > 0 and over else code

    def told(self) -> list[dict[str, Any]]:
        """Each rank, as it is or was.

        Returns:
            the fields of ``signs.Alive``, ``silent`` (seconds since its last word) and ``state`` (of its process),
            where it said that it lives; ``code`` and ``text`` of ``signs.Ended``, where it said how it ends.
        """
        now = time.monotonic()
        living, over = signs.read(self.folder)
        found: dict[int, dict[str, Any]] = {
            sign.rank: {**asdict(sign), "silent": now - sign.spoke, "state": _state(sign.process)}
            for sign in living
        }
        for end in over:
            sign = found.setdefault(end.rank, {"rank": end.rank, "process": end.process})
            if sign["process"] == end.process:
                sign.update(code=end.code, text=end.text)
        return [found[rank] for rank in sorted(found)]


def _has_ended(sign: signs.Alive, over: list[signs.Ended]) -> bool:
    return any(end.process == sign.process for end in over)


def _state(pid: int) -> str:
    """In words; empty where the process is gone."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
    if letter in "ZX":
        return ""
    return {
        "T": "it is stopped by a signal (SIGSTOP)",
        "t": "a debugger holds it",
        "D": "it waits for a disk or a network file system",
    }.get(letter, f"no thread of it can speak (state {letter})")
