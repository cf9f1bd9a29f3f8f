"""The lock of a run folder, between real processes."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mooring.errors import RunFolderError
from mooring.report.run_folder import open_run_folder
from mooring.report.run_lock import LOCK, RunLock

_HOLDS = """
import os, signal, sys
from pathlib import Path
from mooring.report.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
if os.fork() == 0:  # a worker of a data loader, which may outlive its process
    print(os.getpid(), flush=True)
signal.pause()
"""

_TRIES = """
import sys
from pathlib import Path
from mooring.report.run_lock import RunLock
RunLock(Path(sys.argv[1]))
"""


def test_it_ends_with_its_process_though_a_worker_lives_on(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLDS, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        says = f"{re.escape(str(tmp_path))} is being trained by process {process.pid} on {platform.node()}, since .*"
        with pytest.raises(RunFolderError, match=f"{says}kill {process.pid} .*out=FOLDER"):
            RunLock(tmp_path)
        process.kill()
        process.wait()
        assert Path(f"/proc/{worker}").exists()
        RunLock(tmp_path).release()
        os.kill(worker, signal.SIGKILL)


def test_a_process_may_hold_it_several_times(tmp_path: Path) -> None:
    def elsewhere() -> int:
        words = [sys.executable, "-c", _TRIES, str(tmp_path)]
        done = subprocess.run(words, capture_output=True, check=False)
        return done.returncode

    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.release()
    first.release()
    assert elsewhere() != 0
    second.release()
    assert elsewhere() == 0
    open_run_folder(tmp_path)  # still counts as empty


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    lock = RunLock(tmp_path)
    assert lock.problem is not None and "has no locks (No locks available)" in lock.problem
    lock.release()


def test_what_another_process_wrote_there_is_no_matter(tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for words in ("", "{}", '{"process": "x"}', "[" * 10000):
            other.seek(0)
            other.truncate()
            other.write(words)
            other.flush()
            with pytest.raises(RunFolderError, match="is being trained by another process"):
                RunLock(tmp_path)
