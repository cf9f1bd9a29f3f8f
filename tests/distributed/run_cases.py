"""Whole runs by the engine, on one process or on all ranks."""

from __future__ import annotations

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
