"""Small runs of every method, stopped at a chosen place and continued, and what must be equal afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from mooring.config.schema import RunConfig
from mooring.data.batch import Batch
from mooring.distributed import Ranks
from mooring.models.torchvision_shim import import_timm
from mooring.report.metrics_log import Record, read_metrics
from mooring.state.store import checkpoints_of
from mooring.state.tree import load_tree
from mooring.train.engine import Engine

MODEL = "test_resnet"
SOURCE_CLASSES = 5
# Settings that make each method small; every method of the registry must stand here (a test compares the two).
METHODS: dict[str, dict[str, Any]] = {
    "fine_tune": {},
    "linear_probe": {},
    "lp_ft": {"probe_fraction": 0.5},
    "dr_tune": {"bank_size": 10, "rotation_period": 3},
    "l2_sp": {},
    "feature_map": {},
    "delta": {"attention_batches": 2},
    "bss": {},
    "stoch_norm": {},
    "lwf": {},
    "feature_distillation": {"regressor": "linear"},
    "co_tuning": {},
    "bi_tuning": {"queue_rows": 3, "embed_width": 8},
    "core_tuning": {"contrast_width": 8},
    "concept_tuning": {"queue_rows": 2, "bottleneck": 8, "transport_rounds": 3, "predict": "auto"},
    "tes": {"projection_width": 8},
    "soft_fine_tuning": {"source_batch_size": 4, "soft_fraction": 0.9},
    "daft": {},
}
POSITIONS = ("mid_epoch", "epoch_end", "set_up", "validation", "accumulation")
# Two epochs of three steps: the stop inside an epoch is in the second one, where banks, averages and clocks have moved.
STEPS_PER_EPOCH, STOP_STEP = 3, 4
_ACCUMULATE, _BATCH = 2, 2
_CLOCKS = {"seconds", "seconds_training", "seconds_since", "log", "images_per_second"}


class Crash(BaseException):
    """The process is gone: nothing that follows it may be run, as far as Python lets us."""


def write_inputs(root: Path, *, world: int = 1) -> None:
    """Photos for a run on ``world`` processes, source images, weights with a classifier, vectors of the class names."""
    rng = np.random.default_rng(0)
    train = STEPS_PER_EPOCH * _ACCUMULATE * _BATCH * world // 2

    def photos(folder: Path, count: int, tint: int) -> None:
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(tint + rng.normal(0, 40, (24, 26, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")

    for c in range(2):
        for split, count in (("train", train), ("val", 5), ("test", 2)):
            photos(root / "photos" / split / f"class_{c}", count, 80 + 90 * c)
    for c in range(SOURCE_CLASSES):
        photos(root / "source" / "train" / f"s{c}", 3, 40 * c)
        photos(root / "source" / "val" / f"s{c}", 1, 40 * c)
    (root / "divided.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    torch.manual_seed(7)
    timm = import_timm()
    save_file(timm.create_model(MODEL, num_classes=SOURCE_CLASSES).state_dict(), root / "weights.safetensors")
    np.savez(
        root / "text.npz",
        features=rng.normal(size=(2, 6)).astype(np.float32),
        names=np.array(["class_0", "class_1"]),
    )


def settings_of(inputs: Path, method: str) -> dict[str, Any]:
    """The ``method`` table: one method, or several joined by ``+``."""
    table: dict[str, Any] = {"name": method.split("+")}
    for name in method.split("+"):
        table |= METHODS[name]
    if "tes" in table["name"]:
        table["text"] = str(inputs / "text.npz")
    if "soft_fine_tuning" in table["name"]:
        table["source_data"] = str(inputs / "source")
    return table


def make_config(inputs: Path, out: Path, method: str, source: str, **changes: Any) -> RunConfig:
    """A run of six steps with accumulation, running statistics, dropout and an average of the weights."""
    world = Ranks.here().world
    tables: dict[str, Any] = {
        "data": {"path": inputs / "photos", "source": source, "workers": 1},
        "out": out,
        "model": {"name": MODEL, "weights": str(inputs / "weights.safetensors"), "drop_rate": 0.1},
        "method": settings_of(inputs, method),
        "train": {
            "epochs": 2, "batch_size": _BATCH * world, "accumulate": _ACCUMULATE, "image_size": 32, "eval_size": 32,
            "device": "cpu", "batchnorm": "train", "sync_batchnorm": False, "ema_decay": 0.9,
        },
        "backend": {"name": "local" if world == 1 else "ddp"},
        "checkpoint": {"keep_last": 1},
        "report": {"progress": "quiet", "log_every": 2, "tensorboard": False, "plots": False},
    }  # fmt: skip
    for key, value in changes.items():
        base = tables.get(key)
        tables[key] = {**base, **value} if isinstance(base, dict) and isinstance(value, dict) else value
    return RunConfig.model_validate(tables)


def zero(inputs: Path, stage: int) -> dict[str, Any]:
    """DeepSpeed's backend, which by default leaves small parameters whole at stage 3: here none is."""
    return {"name": "deepspeed", "zero_stage": stage, "deepspeed_config": str(inputs / "divided.json")}


# ---------------------------------------------------------------- runs


Ids = dict[int, list[list[int]]]  # step -> ids of each of its micro-batches


def run(config: RunConfig, ids: Ids, arrange: Callable[[Engine], None] = lambda engine: None) -> bool:
    """One process's part of a run; returns whether it was stopped.

    Args:
        config: with ``resume`` where it continues.
        ids: takes what each step was trained on.
        arrange: prepares where the engine is stopped.
    """
    engine = Engine.build(config)
    assert engine.steps_per_epoch == STEPS_PER_EPOCH
    arrange(engine)
    step = engine.step

    def recorded(group: list[Batch]) -> Any:
        at = engine.global_step
        result = step(group)
        ids[at] = [batch.ids.tolist() for batch in group]
        return result

    engine.step = recorded  # type: ignore[method-assign]
    try:
        return engine.fit().interrupted
    except Crash:
        return True


def interrupted_run(config: RunConfig, position: str) -> Ids:
    """The run in two parts, the first of which ends at ``position``."""
    ids: Ids = {}
    assert run(config, ids, STOPS[position]), f"the run was not stopped: {position}"
    torch.randn(7), np.random.rand(3)  # noqa: NPY002  another process has other random states
    assert not run(config.model_copy(update={"resume": "auto"}), ids)
    return ids


def _ask_to_stop() -> None:
    ranks = Ranks.here()
    if ranks.rank == ranks.world - 1:  # one of them is told, all must stop
        os.kill(os.getpid(), signal.SIGTERM)


def _in_step(engine: Engine, act: Callable[[], None], at: int, micro: int) -> None:
    """Acts in the backward of one micro-batch of one step."""
    backward, seen = engine.backend.backward, {"micro": 0}

    def acting(loss: torch.Tensor, *, last: bool) -> None:
        backward(loss, last=last)
        if engine.global_step == at:
            if seen["micro"] == micro:
                act()
            seen["micro"] += 1

    engine.backend.backward = acting  # type: ignore[method-assign]


def _crash() -> None:
    raise Crash


def _stop_mid_epoch(engine: Engine) -> None:
    _in_step(engine, _ask_to_stop, STOP_STEP, _ACCUMULATE - 1)


def _stop_in_accumulation(engine: Engine) -> None:
    _in_step(engine, _ask_to_stop, STOP_STEP, 0)


def _crash_after_epoch(engine: Engine) -> None:
    _in_step(engine, _crash, STEPS_PER_EPOCH, 0)


def _crash_in_set_up(engine: Engine) -> None:
    batches, setup = engine._set_up_batches, engine.method.setup

    def first_only(*arguments: Any) -> Iterator[Batch]:
        for batch in batches(*arguments):
            yield batch
            raise Crash

    def crash_at_the_latest(context: Any) -> None:
        setup(context)
        raise Crash

    engine._set_up_batches = first_only  # type: ignore[method-assign]
    engine.method.setup = crash_at_the_latest  # type: ignore[method-assign]


def _stop_in_validation(engine: Engine) -> None:
    predict = engine.method.predict

    def stopping(images: torch.Tensor) -> torch.Tensor:
        _ask_to_stop()
        return predict(images)

    engine.method.predict = stopping  # type: ignore[method-assign]


STOPS: dict[str, Callable[[Engine], None]] = {
    "mid_epoch": _stop_mid_epoch,
    "epoch_end": _crash_after_epoch,
    "set_up": _crash_in_set_up,
    "validation": _stop_in_validation,
    "accumulation": _stop_in_accumulation,
}


# ---------------------------------------------------------------- one case of the matrix


_undisturbed: dict[tuple[str, ...], tuple[dict[str, Any], Ids]] = {}


def case(inputs: str, folder: str, method: str, source: str, position: str, stage: int | None = None) -> int:
    """An interrupted run against the one that nothing interrupts, on this rank; returns how many tensors are equal.

    Args:
        inputs: of ``write_inputs``, for as many processes as there are here.
        folder: for the runs; that of the undisturbed one is kept in it.
        method, source, position: which case.
        stage: of DeepSpeed's ZeRO; None: the backend of ``make_config``.
    """
    rank = Ranks.here().rank
    name = f"{method}-{source}" + ("" if stage is None else f"-zero{stage}")
    changes = {} if stage is None else {"backend": zero(Path(inputs), stage)}
    key = (inputs, folder, name)
    if key not in _undisturbed:
        ids: Ids = {}
        config = make_config(Path(inputs), Path(folder) / name, method, source, **changes)
        assert not run(config, ids)
        _undisturbed[key] = outcome(Path(folder) / name, rank), ids
    wanted, ids = _undisturbed[key]
    out = Path(folder) / f"{name}-{position}"
    assert interrupted_run(make_config(Path(inputs), out, method, source, **changes), position) == ids
    return assert_equal(wanted, outcome(out, rank))


# ---------------------------------------------------------------- what must be equal


def outcome(folder: Path, rank: int = 0) -> dict[str, Any]:
    """Everything a run leaves that does not depend on the clock."""
    store = checkpoints_of(folder)
    Ranks.here().barrier()  # the log is rank 0's
    found = store.newest()
    assert found.ref is not None and not found.notes
    state = {part: store.read(found.ref, part) for part in ("shared", f"rank-{rank}")}
    return {
        "step": found.ref.step,
        "score": found.ref.score,
        "state": without_clocks(state),
        "best": load_tree(folder / "best"),
        "test": load_tree(folder / "test"),
        "log": [without_clocks_of(record) for record in read_metrics(folder)],
    }


def without_clocks(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: without_clocks(value) for key, value in tree.items() if key not in _CLOCKS}
    return [without_clocks(item) for item in tree] if isinstance(tree, list | tuple) else tree


def without_clocks_of(record: Record) -> tuple[Any, ...]:
    return record.kind, record.step, record.epoch, without_clocks(dict(record.values))


def assert_equal(one: Any, other: Any, place: str = "") -> int:
    """Every value of two trees; returns how many tensors were compared, by ``torch.equal``."""
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), place
        return 1
    if isinstance(one, dict):
        assert list(one) == list(other), place
        return sum(assert_equal(one[key], other[key], f"{place}.{key}") for key in one)
    if isinstance(one, list | tuple):
        assert len(one) == len(other), place
        return sum(
            assert_equal(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True))
        )
    assert one == other or (one != one and other != other), (place, one, other)
    return 0
