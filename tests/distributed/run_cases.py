"""Whole runs by the engine, on one process or on all ranks."""

from __future__ import annotations

import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mooring.config.schema import RunConfig
from mooring.distributed import Ranks
from mooring.errors import DataError
from mooring.train.engine import Engine
from mooring.train.health.diagnosis import NonFiniteError


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


def with_a_fault(policy: str, **tables: Any) -> dict[str, Any]:
    """A run in whose third step rank 1 alone finds a loss that is no number; where that leaves the weights."""
    tables["health"] = {"nonfinite": policy}
    steps: list[bool] = []
    with Engine.build(RunConfig.model_validate(tables)) as engine:
        backward, step = engine.backend.backward, engine.step

        def faulty(loss: Tensor, *, last: bool) -> None:
            bad = engine.global_step == 2 and not steps[2:] and engine.ranks.rank == 1
            backward(loss * math.nan if bad else loss, last=last)

        def compared(group: Any) -> Any:
            before = {name: tensor.clone() for name, tensor in engine.backend.weights().items()}
            try:
                return step(group)
            finally:
                after = engine.backend.weights()
                steps.append(all(torch.equal(before[name], after[name]) for name in before))

        engine.backend.backward = faulty  # type: ignore[method-assign]
        engine.step = compared  # type: ignore[method-assign]
        said = ""
        try:
            engine.fit()
        except NonFiniteError as err:
            said = str(err)
        return {"unmoved": steps, "said": said, "weights": engine.backend.weights()}


def with_a_lost_image(image: str, **tables: Any) -> str:
    """A run whose image is gone once it has been scanned, and is there again afterwards; what that says here."""
    path, away = Path(image), Path(image + ".away")
    with Engine.build(RunConfig.model_validate(tables)) as engine:
        engine.ranks.on_first(lambda: path.rename(away))
        try:
            engine.fit()
        except DataError as err:
            return str(err)
        finally:
            engine.ranks.on_first(lambda: away.rename(path))
    return ""


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
