"""The restart loop, with commands that end in every way a run can end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mooring.exit_codes import HUNG, LOST, PREEMPTED
from mooring.launch.restart import run_with_restarts

# Each start appends its words to a file and ends as the next entry of a list says.
_RUN = """
import os, signal, sys
log, ends, word = sys.argv[1:]
with open(log, "a") as file:
    file.write(word + "\\n")
end = ends.split(",")[len(open(log).readlines()) - 1]
if end.startswith("SIG"):
    os.kill(os.getpid(), getattr(signal, end))
sys.exit(int(end))
"""


@pytest.mark.parametrize(
    ("ends", "restarts", "starts", "code"),
    [
        ("0", 3, 1, 0),
        ("75,0", 3, 2, 0),
        ("SIGKILL,SIGSEGV,75,0", 3, 4, 0),
        ("75,75,75", 2, 3, PREEMPTED),
        ("SIGKILL,SIGKILL", 1, 2, 128 + signal.SIGKILL),
        ("2", 3, 1, 2),  # what the user must put right would come again
        (f"1,{LOST},{HUNG},0", 3, 4, 0),  # a crash, another rank that is lost, a hang
        ("SIGKILL,127", 3, 2, 127),
        ("130", 3, 1, 130),
        ("75,2", 3, 2, 2),
    ],
)
def test_goes_on_where_it_was_taken_down(
    ends: str, restarts: int, starts: int, code: int, tmp_path: Path
) -> None:
    log, notes = tmp_path / "log", []
    command = [sys.executable, "-S", "-c", _RUN, str(log), ends]
    found = run_with_restarts([*command, "first"], [*command, "again"], restarts, note=notes.append)
    assert found == code
    assert log.read_text().split() == ["first", *["again"] * (starts - 1)]
    assert len(notes) == starts - 1
    assert all(f"restart {i + 1} of {restarts}" in note for i, note in enumerate(notes))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_schedulers_signal_is_passed_on_and_ends_the_loop(number: signal.Signals, tmp_path: Path) -> None:
    child = textwrap.dedent(
        """
        import signal, sys, time
        def preempted(number, frame):
            print("told", number, flush=True)
            sys.exit(75)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, preempted)
        print("ready", flush=True)
        time.sleep(60)
        """
    )
    parent = textwrap.dedent(
        """
        import sys
        from mooring.launch.restart import run_with_restarts
        command = [sys.executable, "-S", "-c", sys.argv[1]]
        sys.exit(run_with_restarts(command, command, 5, note=print))
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, number)
        assert process.stdout.read() == f"told {int(number)}\n"
    assert process.returncode == PREEMPTED


def test_a_killed_parent_takes_the_command_with_it(tmp_path: Path, no_waiting: None) -> None:
    """SIGTERM, upon which a training saves its state; without it, it would train on and be in the way of the next."""
    child = textwrap.dedent(
        """
        import signal, sys, time
        def told(number, frame):
            print("told", number, flush=True)
            sys.exit(75)
        signal.signal(signal.SIGTERM, told)
        print("ready", flush=True)
        time.sleep(600)
        """
    )
    parent = textwrap.dedent(
        """
        import sys
        from mooring.launch.restart import run_with_restarts
        command = [sys.executable, "-S", "-c", sys.argv[1]]
        sys.exit(run_with_restarts(command, command, 5, note=print))
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.read() == f"told {int(signal.SIGTERM)}\n"  # and its end: nobody holds the pipe
