"""A whole run's health: the watching thread, notes for the log, and what is kept when something fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mooring.distributed import Ranks
from mooring.errors import DataError, MooringError
from mooring.report.run_folder import RunFolder
from mooring.train.health.banks import compare_banks
from mooring.train.health.diagnosis import NonFiniteError, explain
from mooring.train.health.heartbeat import Heartbeat
from mooring.train.health.spikes import SpikeDetector
from mooring.train.results import StepResult

if TYPE_CHECKING:
    from mooring.train.engine import Engine

DIAGNOSIS = "diagnosis.json"


class RunHealth:
    """What ``fit`` asks while it trains.

    Args:
        engine: of the run.
        folder: where it is recorded.
        note: shows a sentence and writes it into the log.
    """

    def __init__(
        self, engine: Engine, folder: RunFolder, note: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self._engine, self._folder, self._note = engine, folder, note
        self._ranks = Ranks.here()
        settings = engine.config.health
        self.spikes = SpikeDetector(settings.spike)
        self.heartbeat = Heartbeat(
            engine.health.phase,
            folder.path,
            self._ranks.rank,
            hang_after=settings.hang_after,
            slow_after=settings.hang_after_slow,
            abort=self._ranks.world > 1 if settings.hang_abort is None else settings.hang_abort,
            on_hang=lambda text: note(text, {}),
        )

    def after_step(self, result: StepResult) -> None:
        """Records a step that was left out; compares the ranks' banks where that is due.

        Raises:
            BanksDifferError: they are not the same.
        """
        if result.skipped is not None:
            ids = [i for micro in result.skipped["ids"] for i in micro]
            self._note(f"left out: {explain(result.skipped)}", {"skipped_step": result.step, "ids": ids})
        every = self._engine.config.health.compare_banks_every
        if every is not None and (result.step + 1) % every == 0:
            compare_banks(self._engine.method, self._ranks, result.step + 1)

    def logged(self, loss: float) -> None:
        """Notes a jump of the logged loss."""
        jump = self.spikes.look(loss)
        if jump is not None:
            self._note(jump, {"loss_spike": loss})

    def keep(self, err: MooringError, save: Callable[[], None]) -> None:
        """After a failure in training or validation: saves the state from before it, and says so in the error.

        Args:
            err: what ended the run; nothing is done where it is neither a bad step nor the data.
            save: writes the engine's state and returns when it is on the disk.
        """
        # saving takes all ranks: every one of them stops at a bad step, and at a batch that one of them cannot read
        alone = self._ranks.world == 1
        if not (
            isinstance(err, NonFiniteError) or (isinstance(err, DataError) and (alone or err.everywhere))
        ):
            return
        if isinstance(err, NonFiniteError):
            rank = self._ranks.rank
            name = DIAGNOSIS if rank == 0 else f"diagnosis-rank-{rank}.json"
            with suppress(OSError):
                self._folder.write_json(name, err.diagnosis)
        try:
            self._engine.health.back_to_group()
            save()
        except (MooringError, OSError):  # the first error is the one to report
            return
        path = self._folder.path
        kept = f"the state before it is kept: continue with  mooring train --resume {path}"
        if isinstance(err, NonFiniteError):
            kept = f"{path / DIAGNOSIS} has the details; {kept}"
        err.args = (f"{err}; {kept}", *err.args[1:])
