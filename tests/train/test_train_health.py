"""A run that fails keeps the state from before it; hangs, jumps of the loss and lack of memory are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_train_nonfinite import Fault, assert_same

from mooring.config.schema import RunConfig
from mooring.data.sources import dali_is_installed
from mooring.errors import DataError
from mooring.exit_codes import HUNG
from mooring.report.metrics_log import read_metrics
from mooring.train.engine import Engine
from mooring.train.health.diagnosis import NonFiniteError
from mooring.train.health.heartbeat import Heartbeat, Phase, ranks_at
from mooring.train.health.memory import explain_out_of_memory, is_out_of_memory, memory_parts
from mooring.train.health.spikes import SpikeDetector

QUIET = {"report": {"plots": False, "tensorboard": False}}  # what a run costs beside its steps


def finished(config: RunConfig) -> Engine:
    engine = Engine.build(config)
    engine.fit()
    return engine


def continued(config: RunConfig, run: Path) -> Engine:
    return finished(config.model_copy(update={"resume": str(run), "out": run}))


# ---------------------------------------------------------------- what is kept


def test_a_run_that_stops_on_a_fault_is_continued_as_if_there_had_been_none(
    make_config, tmp_path: Path
) -> None:
    undisturbed = finished(make_config(out=tmp_path / "undisturbed", **QUIET))
    config = make_config(out=tmp_path / "faulty", **QUIET, health={"hang_after": None})
    engine = Engine.build(config)
    Fault(engine).at = {8}
    with pytest.raises(
        NonFiniteError, match=r"diagnosis\.json has the details; .*continue with  mooring train"
    ):
        engine.fit()
    diagnosis = json.loads((tmp_path / "faulty" / "diagnosis.json").read_text())
    assert diagnosis["step"] == 7
    assert len(diagnosis["ids"][0]) == 6
    # another policy may continue it
    config = config.model_copy(update={"health": config.health.model_copy(update={"nonfinite": "skip"})})
    again = continued(config, tmp_path / "faulty")
    assert_same(weights(undisturbed), weights(again))


def weights(engine: Engine) -> dict[str, object]:
    """What a finished run ends with: the selected weights, the optimizer, every random stream."""
    state = engine.state_dict()
    return {"method": dict(engine.method.state_dict()), "rest": state}


@pytest.mark.parametrize("source", ["torch", pytest.param("dali", marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", ["vanished", "changed"])
def test_an_image_that_changes_while_a_run_goes_on(
    make_config, tmp_path: Path, write_own_photos, source: str, change: str
) -> None:
    if source == "dali" and not dali_is_installed():
        pytest.skip("DALI is not installed")
    photos = write_own_photos(tmp_path / "photos")
    tables = {"data": {"path": photos, "source": source}, "train": {"accumulate": 2, "epochs": 3}, **QUIET}
    undisturbed = finished(make_config(**tables, out=tmp_path / "undisturbed"))
    engine = Engine.build(make_config(**tables, out=tmp_path / "run"))
    file = engine.train_source.split.file(4)
    content, status = file.read_bytes(), file.stat()

    def disturb(step: int) -> None:
        if step == 4:  # in the second epoch; what is made ahead may still be whole
            file.unlink() if change == "vanished" else file.write_bytes(content[:-7])

    original = engine.step
    engine.step = lambda group: (original(group), disturb(engine.global_step))[0]  # type: ignore[method-assign]
    with pytest.raises(DataError) as failure:
        engine.fit()
    assert str(file) in str(failure.value) and f"mooring train --resume {tmp_path / 'run'}" in str(
        failure.value
    )
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = continued(make_config(**tables), tmp_path / "run")
    assert_same(weights(undisturbed), weights(again))


@pytest.fixture
def write_own_photos():
    from conftest import write_photos  # type: ignore[import-not-found]

    return lambda root: write_photos(root, train=14)


def test_steps_that_are_left_out_are_in_the_log(make_config, tmp_path: Path) -> None:
    engine = Engine.build(
        make_config(health={"nonfinite": "skip"}, report={"log_every": 1, **QUIET["report"]})
    )
    Fault(engine).at = {3}
    engine.fit()
    notes = [record.values for record in read_metrics(tmp_path / "run") if record.kind == "note"]
    (left_out,) = [values for values in notes if "skipped_step" in values]
    assert left_out["skipped_step"] == 2 and len(left_out["ids"]) == 6
    assert engine.health.skips == 1


# ---------------------------------------------------------------- jumps


def test_a_jump_is_told_once_and_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    detector = SpikeDetector(6.0)
    noisy = [2.0 / (1 + i / 20) + 0.05 * float(torch.randn((), generator=generator)) for i in range(200)]
    assert [detector.look(loss) for loss in noisy] == [None] * 200
    assert "jumped to 5" in str(detector.look(5.0))
    assert detector.look(noisy[-1]) is None
    again = SpikeDetector(6.0)
    again.load_state_dict(detector.state_dict())
    assert again.look(4.0) == detector.look(4.0)
    assert again.mean == detector.mean
    assert SpikeDetector(None).look(1e9) is None and detector.look(float("nan")) is None


# ---------------------------------------------------------------- hangs


def test_a_hang_is_reported_with_the_stack_and_every_rank(tmp_path: Path) -> None:
    phase, told, heard = Phase(), [], threading.Event()

    def on_hang(text: str) -> None:
        told.append(text)
        heard.set()

    other = Heartbeat(Phase(), tmp_path, 1, hang_after=None)
    with other, Heartbeat(phase, tmp_path, 0, hang_after=0.2, on_hang=on_hang):
        phase.step = 17
        phase.enter("backward")
        stands_still(heard)
        phase.enter("step")
    assert "'backward' of step 17" in told[0] and len(told) == 1
    report = (tmp_path / "heartbeat" / "hang-rank-0.txt").read_text()
    assert "rank 1: 'start'" in report and "stands_still" in report
    assert ranks_at(tmp_path)[0].startswith("'ended', step 17")


def stands_still(heard: threading.Event) -> None:
    assert heard.wait(60)


def test_progress_is_no_hang(tmp_path: Path) -> None:
    phase, told = Phase(), []
    with Heartbeat(phase, tmp_path, 0, hang_after=5.0, on_hang=told.append):
        for _ in range(20):
            phase.beat()
            time.sleep(0.01)
    assert told == []


def test_a_hang_may_end_the_process(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\nfrom mooring.train.health.heartbeat import Heartbeat, Phase\n"
        "with Heartbeat(Phase(), pathlib.Path(sys.argv[1]), 0, hang_after=0.1, abort=True):\n    time.sleep(120)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=100)
    assert done.returncode == HUNG
    assert (tmp_path / "heartbeat" / "hang-rank-0.txt").is_file()


# ---------------------------------------------------------------- memory

_LIMITED = """
import resource, sys
from mooring.config.load import load_config
from mooring.errors import MooringError
from mooring.train.engine import Engine
engine = Engine.build(load_config(None, sys.argv[1:]))
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20),) * 2)
try:
    engine.fit()
except MooringError as err:
    print(type(err).__name__, err)
"""


def test_a_run_that_the_machine_cannot_hold_says_what_to_do(photos: Path, tmp_path: Path) -> None:
    words = [
        f"data={photos}", "data.source=torch", "data.workers=1", f"out={tmp_path / 'run'}", "method=fine_tune",
        "model.name=resnet10t", "model.weights=none", "train.batch_size=24", "train.image_size=384",
        "train.eval_size=32", "train.device=cpu", "report.progress=quiet",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, *words], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OutOfMemoryError this machine has too little memory"), done.stdout
    assert "parameters and buffers" in done.stdout
    assert "train.batch_size=12 train.accumulate=2" in done.stdout


def test_what_takes_the_memory_is_named(make_config) -> None:
    with Engine.build(
        make_config(method={"name": "dr_tune", "bank_size": 10}, train={"ema_decay": 0.9})
    ) as engine:
        engine.prepare()
        engine.step(next(engine.epoch_groups()))
        parts = memory_parts(engine)
        parameters = sum(p.numel() * 4 for p in engine.method.parameters())
        assert parts["gradients"] == parameters
        assert parts["parameters and buffers"] >= parameters
        assert parts["optimizer (AdamW)"] >= 2 * parameters
        assert parts["frozen or key networks"] > 0.9 * parameters and parts["banks"] > 0
        assert list(parts.values()) == sorted(parts.values(), reverse=True)
        with pytest.raises(RuntimeError) as failure:
            torch.empty(1 << 60)
        assert is_out_of_memory(failure.value) and is_out_of_memory(MemoryError())
        assert not is_out_of_memory(RuntimeError("shapes differ"))
        text = str(explain_out_of_memory(engine, failure.value))
        assert "optimizer (AdamW)" in text and "train.batch_size=3 train.accumulate=2" in text
