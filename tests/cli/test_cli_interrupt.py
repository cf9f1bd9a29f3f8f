"""Signals as users and schedulers send them: real processes, and a run folder that can be used afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mooring.cli import app
from mooring.exit_codes import PREEMPTED, USER_ERROR
from mooring.state.store import checkpoints_of
from mooring.train.engine import Engine
from mooring.train.inference import load_run


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """``mooring train`` of a run that would go on for hours."""
    rng = np.random.default_rng(0)
    for c in range(2):
        folder = tmp_path / "photos" / f"class_{c}"
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = np.clip(90 + 90 * c + rng.normal(0, 30, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return [
        sys.executable, "-m", "mooring.cli", "train",
        f"data={tmp_path / 'photos'}", f"out={tmp_path / 'run'}", "model.name=test_resnet", "model.weights=none",
        "method=fine_tune", "train.image_size=32", "train.eval_size=32", "train.batch_size=4", "train.epochs=50000",
        "data.source=torch", "data.workers=1", "report.plots=false", "report.tensorboard=false",
    ]  # fmt: skip


@contextmanager
def running(words: list[str], folder: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "MOORING_CACHE": str(folder / "cache")}
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may themselves run under nohup
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )
    signal.signal(signal.SIGHUP, before)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + 240
    while not reached():
        told = process.stderr is not None and not process.stderr.closed
        assert process.poll() is None, process.stderr.read() if told else process.returncode
        assert time.monotonic() < give_up
        time.sleep(0.1)


def epochs_logged(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_text().count('"val"') if log.is_file() else 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, PREEMPTED)])
def test_a_signal_leaves_a_run_that_predicts_and_continues(
    words: list[str], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    with running(words, tmp_path) as process:
        wait_until(lambda: epochs_logged(run) > 0, process)  # one epoch is done, another is under way
        process.send_signal(number)
        _, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors
    assert "mooring train --resume" in errors.replace("\n", " ")
    assert load_run(run).classes == ["class_0", "class_1"]
    assert checkpoints_of(run).newest().ref is not None


@pytest.mark.parametrize("while_", ["the data is read", "the method is set up"])
def test_who_stops_before_the_first_step_is_not_told_that_something_is_kept(
    words: list[str], tmp_path: Path, while_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        if while_ == "the data is read":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setenv("MOORING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Engine, "build" if while_ == "the data is read" else "prepare", interrupted)
    found = CliRunner(env={"COLUMNS": "400"}).invoke(app, words[3:])
    says = " ".join(found.stderr.replace("│", " ").split())
    assert found.exit_code == 130, found.output
    if while_ == "the data is read":
        assert "stopped before the run began; nothing was written" in says
    else:
        assert "stopped in the set-up: no step was done and no state saved; begin anew with" in says
    assert "kept" not in says and "finished" not in says


def test_a_killed_run_restarts_by_itself_and_ends_when_preempted(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running([*words, "--restarts", "1"], tmp_path) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            pytest.skip("this system does not list the children of a process")
        wait_until(lambda: len(checkpoints_of(run).refs()) > 0, process)
        (first,) = map(int, children.read_text().split())
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: children.read_text().split() not in ([str(first)], []), process)
        done = epochs_logged(run)
        wait_until(lambda: epochs_logged(run) > done, process)
        process.send_signal(signal.SIGTERM)  # to the parent, which passes it on
        _, errors = process.communicate(timeout=240)
    assert process.returncode == PREEMPTED, errors
    assert "killed by SIGKILL: starting again from its newest state, restart 1 of 1" in errors.replace(
        "\n", " "
    )
    found = checkpoints_of(run).newest()
    assert found.ref is not None and found.ref.reason == "stopped"


def test_the_second_signal_leaves_at_once(tmp_path: Path) -> None:
    code = (
        "import os, signal, time\n"
        "from mooring.train.interrupt import Interrupt, Stopped\n"
        "with Interrupt(lambda: print('asked', flush=True)) as interrupt:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"  # the same request, told twice
        "    try: interrupt.check()\n"
        "    except Stopped as stopped: print(stopped.preempted, flush=True)\n"
        "    time.sleep(1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "asked\nTrue\n"), done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_spares_the_processes_that_read_images(
    words: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    """As a scheduler, a terminal or ``kill -- -PID`` sends it, with more than one process that prepares images."""
    run = tmp_path / "run"
    with running([*words, "data.workers=2"], tmp_path, start_new_session=True) as process:
        wait_until(lambda: epochs_logged(run) > 0, process)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=240)
    assert process.returncode == PREEMPTED, errors
    assert errors.count("interrupted: finishing this step") == 1
    found = checkpoints_of(run).newest()
    assert found.ref is not None and found.ref.reason == "stopped"


def test_a_process_that_reads_images_and_dies_is_named_and_the_state_kept(
    words: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with running([*words, "data.workers=2"], tmp_path) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            pytest.skip("this system does not list the children of a process")
        wait_until(lambda: epochs_logged(run) > 0, process)
        wait_until(lambda: len(children.read_text().split()) > 1, process)
        os.kill(
            int(children.read_text().split()[-1]), signal.SIGKILL
        )  # as the kernel does where memory runs out
        _, errors = process.communicate(timeout=240)
    said = " ".join(errors.replace("│", " ").split())
    assert process.returncode == USER_ERROR, errors
    assert "a process that prepares images is gone" in said and "fewer data.workers" in said
    assert "the state before it is kept" in said
    assert checkpoints_of(run).newest().ref is not None


@pytest.mark.parametrize("more", [[], ["--restarts", "1"]], ids=["alone", "with restarts"])
def test_a_preemption_before_there_is_anything_to_save_is_one(
    words: list[str], tmp_path: Path, more: list[str]
) -> None:
    with running([*words, *more], tmp_path) as process:
        time.sleep(1.5)  # somewhere in its imports and its scan: wherever it is, the answer is the same
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=240)
    assert process.returncode == PREEMPTED, errors
    assert "Traceback" not in errors


def test_a_run_outlives_who_reads_what_it_says(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running(words, tmp_path) as process:
        assert process.stderr is not None
        process.stderr.close()
        wait_until(lambda: epochs_logged(run) > 1, process)
        process.send_signal(signal.SIGTERM)
        process.wait(240)
    assert process.returncode == PREEMPTED
    assert checkpoints_of(run).newest().ref is not None
