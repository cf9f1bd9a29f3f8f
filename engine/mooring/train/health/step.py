"""One step's health: what it must be able to undo, whether it may be taken, what happens where it may not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mooring.data.batch import Batch
from mooring.distributed import Ranks
from mooring.methods.base import StepOutput
from mooring.train.health.diagnosis import NonFiniteError, diagnose, explain
from mooring.train.health.heartbeat import Phase
from mooring.train.health.nonfinite import Verdict, judge, take_step
from mooring.train.health.undo import Undo

if TYPE_CHECKING:
    from mooring.train.engine import Engine


class StepHealth:
    """Stands between an engine's backward pass and its step.

    Args:
        engine: built; ``config.health`` says what is done.

    Attributes:
        phase: what the engine is doing, for whoever watches.
        skips: steps that were left out so far.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._settings = engine.config.health
        self._undo = Undo(engine.method)
        self._places: dict[str, Any] = {}
        self._group: tuple[int, int] | None = None
        self.phase = Phase()
        self.skips = 0

    @property
    def is_on(self) -> bool:
        return self._settings.nonfinite != "off"

    def before_group(self) -> None:
        """The next group of batches is about to be drawn from the training source."""
        source = self._engine.train_source
        self._group = source.epoch, source.position
        self.phase.enter("data")

    def before_step(self) -> None:
        """The step begins: nothing that depends on its batches has happened yet."""
        engine = self._engine
        self.phase.step = engine.global_step
        self.phase.steps_begun += 1
        self.phase.enter("forward")
        if not self.is_on:
            return
        self._undo.keep()
        self._places = {"mixer": engine.mixer.state_dict()}
        if engine.source_stream is not None:
            self._places["source_stream"] = engine.source_stream.state_dict()

    def judge(self, loss: Tensor) -> Verdict | None:
        """Looks at loss and gradients, before clipping; None where that is not wanted."""
        if not self.is_on:
            return None
        backend = self._engine.backend
        parameters: list[nn.Parameter] = []
        if backend.divided:  # no parameter's own, but the norm of all is known
            norms = backend.clip(math.inf).reshape(1).to(loss.device)
        else:
            parameters, norms = backend.gradient_norms()
        return judge(loss, parameters, norms, lambda flag: Ranks.here().all_reduce_(flag, "max"))

    def take(self, verdict: Verdict | None) -> bool:
        """Takes the optimizer's step unless the verdict is bad; every rank decides alike."""
        self.phase.enter("step")
        engine = self._engine
        taken = True
        if verdict is None:
            engine.backend.step()
        else:
            taken = take_step(verdict, engine.backend, engine.optimizer)
        if taken:
            self._group = None  # done with
        return taken

    def not_taken(
        self, verdict: Verdict, outputs: Sequence[StepOutput], batches: Sequence[Batch]
    ) -> dict[str, Any]:
        """Undoes a step that was not taken.

        Returns:
            Its diagnosis, where the step is left out.

        Raises:
            NonFiniteError: the run stops; the engine is where it was before the step and can be saved.
        """
        engine = self._engine
        at = engine.global_step
        names = {id(p): name for name, p in engine.method.named_parameters()}
        found = diagnose(at, at // engine.steps_per_epoch, outputs, batches, verdict, engine.optimizer, names)
        self._undo.put_back_buffers()
        if self._settings.nonfinite == "skip" and self.skips < self._settings.max_skips:
            self.skips += 1
            return found
        self._undo.put_back_streams()
        engine.mixer.load_state_dict(self._places["mixer"])
        if engine.source_stream is not None:
            engine.source_stream.load_state_dict(self._places["source_stream"])
        self.back_to_group()
        message = explain(found)
        if self._settings.nonfinite == "skip":
            message += f". {self.skips} steps were left out before it, health.max_skips of them"
        raise NonFiniteError(message, found)

    def back_to_group(self) -> None:
        """The training source stands again where the group under way was drawn, where ``before_group`` told."""
        source = self._engine.train_source
        if self._group is not None and self._group != (source.epoch, source.position):
            epoch, position = self._group
            source.load_state_dict(source.state_dict() | {"epoch": epoch, "position": position})

    def state_dict(self) -> dict[str, Any]:
        return {"skips": self.skips}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skips = int(state["skips"])
