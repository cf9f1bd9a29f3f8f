"""The folder of a run that is continued: nobody else trains in it, and nothing outside it is touched."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from resume_cases import STOPS, make_config, run, write_inputs
from typer.testing import CliRunner

from mooring.cli import app

_HOLDS = """
import signal, sys
from pathlib import Path
from mooring.report.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its second epoch, in ``run/``."""
    root = tmp_path_factory.mktemp("folder")
    write_inputs(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOORING_CACHE", str(root / "cache"))
        config = make_config(root, root / "run", "fine_tune", "torch", report={"tensorboard": True})
        assert run(config, {}, STOPS["mid_epoch"])
    return root


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it: the run folder."""
    monkeypatch.setenv("MOORING_CACHE", str(stopped_once / "cache"))
    return Path(shutil.copytree(stopped_once / "run", tmp_path / "run"))


def resumed(folder: Path) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", "--resume", str(folder)])
    return done.exit_code, done.stderr


def content(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_run_that_goes_on_elsewhere_is_not_continued(stopped: Path) -> None:
    words = [sys.executable, "-c", _HOLDS, str(stopped)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        (stopped / "checkpoints" / "step-6.partial").mkdir()  # what the other one is writing
        before = content(stopped)
        code, says = resumed(stopped)
        assert code == 2 and f"is being trained by process {other.pid}" in says
        assert content(stopped) == before and (stopped / "checkpoints" / "step-6.partial").is_dir()
        other.kill()
    assert resumed(stopped)[0] == 0
    assert (stopped / ".lock").read_bytes() == b""


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_what_a_link_in_it_leads_to_is_not_cut(name: str, stopped: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (stopped / name).rename(victim)
    if name == "tensorboard":  # of another run
        (victim / "events.out.tfevents.1700000000.x").write_text("precious")
    else:
        victim.write_text("precious\n" * 1000)
    (stopped / name).symlink_to(victim)
    before = content(tmp_path)
    code, says = resumed(stopped)
    assert code == 2 and f"a symbolic link to {victim}" in says
    assert content(tmp_path) == before
