"""Whole runs by the engine, on one process or on all ranks."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

from mooring.config.schema import RunConfig
from mooring.distributed import Ranks
from mooring.train.engine import Engine


def fit(**tables: Any) -> dict[str, Any]:
    """A run as ``Engine.fit`` does it; losses are those that the run's log holds."""
    config = RunConfig.model_validate(tables)
    with Engine.build(config) as engine:
        result = engine.fit()
        assert result.val is not None
        return {
            "rank": Ranks.here().rank,
            "backend": engine.backend.name,
            "batch": engine.train_source.batch_size,
            "steps": engine.global_step,
            "run": Path(result.run),
            "val": (result.val.scalars(), result.val.n, result.val.confusion),
            "test": None if result.test is None else (result.test.scalars(), result.test.n),
            "best_epoch": result.best_epoch,
        }


def stopped_and_continued(steps: int, **tables: Any) -> dict[str, Any]:
    """A run that a signal to rank 1 stops after some steps, and its continuation."""
    config = RunConfig.model_validate(tables)
    engine = Engine.build(config)
    step = engine.step

    def stopping(group: Any) -> Any:
        result = step(group)
        if engine.global_step == steps and engine.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    engine.step = stopping  # type: ignore[method-assign]
    first = engine.fit()
    assert first.preempted and engine.global_step == steps
    return fit(**tables, resume="auto")


def warned(**tables: Any) -> list[str]:
    """What rank 0 is told of the warnings of others."""
    with Engine.build(RunConfig.model_validate(tables)) as engine:
        log = logging.getLogger("mooring.somewhere")
        log.warning("said by all")
        if engine.ranks.rank == 1:
            log.warning("said by one")
        return engine.warnings.collect() + engine.warnings.collect()


def seen(**tables: Any) -> list[list[int]]:
    """Manifest ids of this rank's training batches of two epochs."""
    with Engine.build(RunConfig.model_validate(tables)) as engine:
        return [batch.ids.tolist() for _ in range(2) for batch in engine.train_source]


def refused(**tables: Any) -> str:
    """What building the run says on this rank."""
    try:
        Engine.build(RunConfig.model_validate(tables)).close()
    except ValueError as err:
        return f"{type(err).__name__}: {err}"
    return "built"
