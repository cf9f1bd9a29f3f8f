"""Runs that go on with another number of processes, backend or ZeRO stage, and what a rank holds afterwards."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from resume_cases import settings_of

from mooring.config.schema import RunConfig
from mooring.distributed import Ranks
from mooring.report.metrics_log import read_metrics
from mooring.state.store import checkpoints_of
from mooring.train.engine import Engine
from mooring.train.exactness import differences, run_facts

BATCH = 8  # of all processes


def make_config(inputs: str, out: str, method: str, backend: dict[str, Any], **tables: Any) -> RunConfig:
    """Three epochs of three steps, with an average of the weights; the same for any number of processes."""
    batchnorm = tables.pop("batchnorm", "auto")
    model = tables.pop("model", "test_resnet")
    table = {**settings_of(Path(inputs), method), **tables.pop("settings", {})}
    weights = str(Path(inputs) / "weights.safetensors") if model == "test_resnet" else "none"
    return RunConfig.model_validate(
        {
            "data": {"path": str(Path(inputs) / "photos"), "source": tables.pop("source", "torch"), "workers": 1},
            "out": out,
            "model": {"name": model, "weights": weights},
            "method": table,
            "train": {
                "epochs": 3, "batch_size": BATCH, "image_size": 32, "eval_size": 32, "device": "cpu",
                "batchnorm": batchnorm, "ema_decay": 0.9, **tables.pop("train", {}),
            },
            "backend": backend,
            "report": {"progress": "quiet", "log_every": 1, "tensorboard": False, "plots": False},
            **tables,
        }
    )  # fmt: skip


def part(stop: int | None = None, **arguments: Any) -> list[list[int]]:
    """A run, or what is left of it; up to ``stop`` steps where given. Returns the ids of this rank's batches."""
    config = make_config(**arguments)
    engine = Engine.build(config)
    step, ids = engine.step, []

    def recorded(group: Any) -> Any:
        result = step(group)
        ids.append([i for batch in group for i in batch.ids.tolist()])
        if engine.global_step == stop and engine.ranks.rank == engine.ranks.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    engine.step = recorded  # type: ignore[method-assign]
    result = engine.fit()
    assert result.interrupted == (stop is not None)
    return ids


def some_images() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(8))


def logits_at(stop: int, **arguments: Any) -> torch.Tensor:
    """What the run's own processes answer after so many steps, which are saved; they validate with these weights."""
    config = make_config(**arguments)
    engine = Engine.build(config)
    groups = engine.epoch_groups()
    engine.prepare()
    while engine.global_step < stop:
        group = next(groups, None)
        if group is None:
            groups = engine.epoch_groups()
            continue
        engine.step(group)
    engine.save("for the export")
    engine.ranks.on_first(lambda: engine.parts.manifest.save(Path(arguments["out"]) / "manifest"))
    with engine._evaluated_weights(), torch.no_grad():
        logits = engine.backend.predict(some_images().to(memory_format=torch.channels_last))
    engine.close()
    return logits.float()


def losses(run: str) -> list[float]:
    return [record.values["loss"] for record in read_metrics(Path(run)) if record.kind == "train"]


def what_differs(**arguments: Any) -> list[str]:
    """Names of what breaks exactness for this engine, against the newest checkpoint of the run."""
    config = make_config(**arguments, resume=arguments["out"])
    store = checkpoints_of(Path(arguments["out"]))
    with Engine.build(config) as engine:
        ref = store.newest().ref
        assert ref is not None
        return [d.name for d in differences(store.facts(ref), run_facts(engine)) if d.breaks]


def carried(ref: str, **arguments: Any) -> dict[str, Any]:
    """What an engine holds right after it took the newest checkpoint of a run."""
    config = make_config(**arguments).model_copy(update={"resume": ref, "allow_inexact": True})
    store = checkpoints_of(Path(ref))
    with Engine.build(config) as engine:
        found = store.newest().ref
        assert found is not None
        engine.resume(found)
        optimizer = engine.optimizer
        steps = [s["step"] for s in optimizer.state.values() if torch.is_tensor(s.get("step"))]
        return {
            "optimizer": engine.backend.state_dict(),
            "steps": [float(step) for step in steps],
            "own steps": len({step.data_ptr() for step in steps}),
            "groups": [(g["name"], g["weight_decay"], g["betas"]) for g in optimizer.param_groups],
            "weights": {k: v.clone() for k, v in engine.backend.weights().items()},
            "extra": engine.method.extra_state(),
            "drawn": float(torch.rand(())),
            "step": engine.global_step,
            "inexact": engine.inexact,
            "rank": Ranks.here().rank,
        }
