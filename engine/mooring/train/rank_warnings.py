"""Warnings of the ranks that do not speak, brought to the one that does."""

from __future__ import annotations

import logging

from mooring.distributed import Ranks

_LOGGER = logging.getLogger("mooring")


class RankWarnings(logging.Handler):
    """Keeps what ranks other than 0 warn of, instead of showing it there; ``collect`` hands it to rank 0.

    Most warnings come on every rank, and rank 0 has shown its own: only what it has not said itself is handed over.

    Args:
        ranks: the processes of the run.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(logging.WARNING)
        self.ranks = ranks
        self._kept: list[str] = []
        self._said: set[str] = set()
        if ranks.world > 1:
            _LOGGER.addHandler(self)
            _LOGGER.propagate = ranks.is_first and _LOGGER.propagate

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append(record.getMessage())

    def collect(self) -> list[str]:
        """What other ranks warned of since the last call, each once, with their numbers: on rank 0; all call it."""
        kept, self._kept = self._kept, []
        if self.ranks.world == 1:
            return []
        every = self.ranks.gather(kept)
        self._said |= set(every[0])
        found: dict[str, list[int]] = {}
        for rank, messages in enumerate(every[1:], start=1):
            for message in messages:
                if message not in self._said:
                    found.setdefault(message, []).append(rank)
        self._said |= set(found)
        if not self.ranks.is_first:
            return []
        return [f"rank {', '.join(map(str, dict.fromkeys(where)))}: {what}" for what, where in found.items()]

    def close(self) -> None:
        _LOGGER.removeHandler(self)
        super().close()
