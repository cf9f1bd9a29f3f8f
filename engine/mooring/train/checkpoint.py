"""The state of a run: what it holds and how it is put back."""

from __future__ import annotations

import copy
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mooring.config.schema import RunConfig
from mooring.errors import RunFolderError
from mooring.state.rng import capture_rng, restore_rng
from mooring.state.tree import load_tree, previous_tree, save_tree

if TYPE_CHECKING:
    from mooring.train.engine import Engine

# Settings that may differ between the two halves of a run without changing what is computed.
_FREE = frozenset({"out", "resume", "report"})


def engine_state(engine: Engine) -> dict[str, Any]:
    """Parameters, optimizer, banks, data position, random streams, counters of ``engine``."""
    return {
        "step": engine.global_step,
        "epochs_validated": engine.epochs_validated,
        "clock": list(engine.clock),
        "method": dict(engine.method.state_dict()),
        "extra": engine.method.extra_state(),
        "optimizer": _optimizer_state(engine.optimizer),
        "ema": None if engine.ema is None else engine.ema.state_dict(),
        "source": engine.train_source.state_dict(),
        "source_stream": None if engine.source_stream is None else engine.source_stream.state_dict(),
        "mixer": engine.mixer.state_dict(),
        "best": engine.best.state_dict(),
        "rng": capture_rng(),
        "manifest": engine.parts.manifest.digest,
        "config": _comparable(engine),
        "environment": _environment(),
    }


def restore_engine(engine: Engine, state: dict[str, Any]) -> None:
    """Puts ``state`` into a freshly built engine of the same settings and data.

    Raises:
        RunFolderError: the state belongs to other settings or other data.
    """
    here = _comparable(engine)
    differing = sorted(
        k for k in here.keys() | state["config"].keys() if here.get(k) != state["config"].get(k)
    )
    if differing:
        lines = [f"{k}: saved {state['config'].get(k)}, now {here.get(k)}" for k in differing]
        raise RunFolderError(
            "the saved run has other settings; resume with the same ones:\n  " + "\n  ".join(lines)
        )
    if state["manifest"] != engine.parts.manifest.digest:
        raise RunFolderError(
            f"the saved run was trained on another list of images (manifest {state['manifest'][:12]}, "
            f"now {engine.parts.manifest.digest[:12]}): restore the data or start a new run"
        )
    # Versions and threads change rounding, not the computation: the run goes on, and says so.
    engine.resume_notes = [
        f"continued with {name} {now}, started with {state['environment'].get(name)}: not bit for bit the same run"
        for name, now in _environment().items()
        if state["environment"].get(name) != now
    ]
    try:
        engine.method.load_extra_state(state["extra"])  # first: it may refuse, and nothing is overwritten yet
    except ValueError as err:
        raise RunFolderError(f"the saved run cannot be continued: {err}") from None
    engine.method.load_state_dict(state["method"])
    _load_optimizer_state(engine.optimizer, state["optimizer"])
    if engine.ema is not None:
        engine.ema.load_state_dict(state["ema"])
    engine.train_source.load_state_dict(state["source"])
    if engine.source_stream is not None:
        engine.source_stream.load_state_dict(state["source_stream"])
    engine.mixer.load_state_dict(state["mixer"])
    engine.best.load_state_dict(state["best"])
    engine.global_step = int(state["step"])
    engine.epochs_validated = int(state["epochs_validated"])
    seconds, training, images = state["clock"]
    engine.clock = (float(seconds), float(training), int(images))
    restore_rng(state["rng"])


def save(engine: Engine, folder: Path) -> Path:
    """Writes the engine's state into ``folder``; an earlier state there is replaced only once this one is whole."""
    save_tree(folder, engine_state(engine), replace=True)
    return folder


def resume(engine: Engine, folder: Path) -> None:
    """Loads the state in ``folder`` into ``engine``."""
    engine.load_state_dict(load_tree(folder))


def resumable_state(config: RunConfig) -> Path | None:
    """The state folder that ``config.resume`` names, or None for a fresh run.

    Raises:
        RunFolderError: a run was named that has no state, or ``resume=auto`` without ``out``.
    """
    if config.resume is None:
        return None
    if config.resume == "auto" and config.out is None:
        raise RunFolderError("resume=auto continues the run in out=; got no out")
    run = config.out if config.resume == "auto" else Path(config.resume)
    assert run is not None
    state = run / "state"
    if state.is_dir() or previous_tree(state).is_dir():
        return state
    if config.resume == "auto":
        return None
    raise RunFolderError(
        f"resume: {config.resume} holds no state/ folder; expected a run folder of an earlier run"
    )


def _comparable(engine: Engine) -> dict[str, str]:
    """Dotted settings as text, without those that change nothing."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = repr(value)

    walk("", {k: v for k, v in engine.config.model_dump(mode="json").items() if k not in _FREE})
    flat.pop("data.workers", None)  # decoding order does not depend on it
    for name in [name for name in flat if name.startswith("data.extra_test")]:
        del flat[name]  # looked at when the training is over
    # what `auto` became on this machine
    parts = engine.parts
    flat |= {
        "train.device": str(parts.backend.device),
        "train.precision": parts.precision,
        "optimizer.implementation": type(parts.optimizer).__qualname__,
        "data.source": parts.train_source.kind,
    }
    return flat


def _environment() -> dict[str, str]:
    versions = {name: version(name) for name in ("torch", "timm", "numpy")}
    return {**versions, "CPU threads": str(torch.get_num_threads())}


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Per-parameter state in the order of the groups (JSON keys are strings, so a list, not a dict of ints)."""
    saved = optimizer.state_dict()
    count = sum(len(g["params"]) for g in saved["param_groups"])
    # Apex counts its steps in the groups
    groups = [
        {k: v for k, v in g.items() if k not in ("params", "lr") and isinstance(v, int | float)}
        for g in saved["param_groups"]
    ]
    return {"state": [saved["state"].get(i) for i in range(count)], "groups": groups}


def _load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    fresh = optimizer.state_dict()
    for group, saved in zip(fresh["param_groups"], state["groups"], strict=True):
        group.update(saved)
    # a copy: torch keeps references, and two optimizers would write into one momentum buffer
    fresh["state"] = copy.deepcopy({i: s for i, s in enumerate(state["state"]) if s is not None})
    optimizer.load_state_dict(fresh)
    # torch's fused optimizers walk parameter and buffers in memory order and do not compare strides: a buffer
    # that came back contiguous beside a channels_last parameter would be applied to the wrong elements
    for parameter, buffers in optimizer.state.items():
        for name, buffer in buffers.items():
            if torch.is_tensor(buffer) and buffer.shape == parameter.shape:
                buffers[name] = torch.empty_like(parameter, dtype=buffer.dtype).copy_(buffer)
