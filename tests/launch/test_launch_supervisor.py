"""Agents and their supervisor on real processes: output, exit codes, failures, lost supervisors, orphans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mooring.exit_codes import HUNG, INTERRUPTED, LOST, PREEMPTED, USER_ERROR
from mooring.launch.agent import descendants
from mooring.launch.attempts import run_with_restarts
from mooring.launch.hosts import Host
from mooring.launch.plan import Command, LaunchPlan, Program, Rendezvous, local_plan
from mooring.launch.request import LaunchRequest
from mooring.launch.supervisor import Job, LaunchError, Limits, Remote, relay, run_plan

# quick where nothing depends on this machine being quick
QUICK = Limits(connect=120, heartbeat=0.2, silence=120, settle=0.5, grace=1)


def plan_of(folder: Path, *sources: str) -> LaunchPlan:
    """One command a source, each a Python program in ``folder``."""
    commands = []
    for rank, source in enumerate(sources):
        file = folder / f"program{rank}.py"
        file.write_text(source)
        commands.append(
            Command(Host("localhost", 1), range(rank, rank + 1), (sys.executable, "-u", str(file)))
        )
    return LaunchPlan("test", tuple(commands), len(commands))


class Heard:
    def __init__(self) -> None:
        self.texts: dict[tuple[int, int], str] = {}

    def __call__(self, command: Command, text: str, to: int) -> None:
        key = command.ranks.start, to
        self.texts[key] = self.texts.get(key, "") + text


def wait_for(file: Path) -> str:
    """The content of a file that a program writes as a whole."""
    deadline = time.monotonic() + 180
    while not (file.is_file() and file.read_text().endswith("\n")):
        assert time.monotonic() < deadline, f"{file} was not written"
        time.sleep(0.02)
    return file.read_text()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 180
    while runs(pid):
        assert time.monotonic() < deadline, f"{pid} still runs"
        time.sleep(0.02)


def test_output_environment_and_folder(tmp_path: Path) -> None:
    heard = Heard()
    source = "import os, sys\nprint(os.environ['RANK'], os.getcwd())\nprint('naïve ✓', file=sys.stderr)\n"
    (tmp_path / "shown.py").write_text(source)
    plan = local_plan(Program(sys.executable, "shown", (), {"PYTHONIOENCODING": "utf-8"}), 2)
    run_plan(plan, remote=Remote(), limits=QUICK, cwd=str(tmp_path), output=heard)
    assert heard.texts == {
        (0, 1): f"0 {tmp_path}\n", (1, 1): f"1 {tmp_path}\n", (0, 2): "naïve ✓\n", (1, 2): "naïve ✓\n",
    }  # fmt: skip


def test_the_first_failure_is_told_and_the_others_are_ended(tmp_path: Path) -> None:
    waits = "import os, time\nopen('pid', 'w').write(f'{os.getpid()}\\n')\ntime.sleep(600)\n"
    fails = (
        "import sys, time, pathlib\n"
        "while not pathlib.Path('pid').is_file(): time.sleep(0.02)\n"
        "print('no such weights', file=sys.stderr)\nsys.exit(3)\n"
    )
    with pytest.raises(LaunchError) as error:
        run_plan(
            plan_of(tmp_path, waits, fails), remote=Remote(), limits=QUICK, cwd=str(tmp_path), output=Heard()
        )
    text = str(error.value)
    assert text.startswith("localhost (rank 1): exit code 3")
    assert "no such weights" in text
    wait_until_gone(int(wait_for(tmp_path / "pid")))


def test_a_process_that_hears_nothing_is_killed(tmp_path: Path) -> None:
    """SIGTERM ignored, stopped by SIGSTOP, or both: the job ends all the same."""
    deaf = (
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open(f'pid{os.path.basename(__file__)[7]}', 'w').write(f'{os.getpid()}\\n')\n"
        "if '1.py' in __file__: os.kill(os.getpid(), signal.SIGSTOP)\n"
        "time.sleep(600)\n"
    )
    fails = (
        "import pathlib, time\n"
        "while not all(pathlib.Path(f'pid{i}').is_file() for i in (0, 1)): time.sleep(0.02)\n"
        "raise SystemExit(1)\n"
    )
    with pytest.raises(LaunchError, match=r"rank 2\): exit code 1"):
        run_plan(
            plan_of(tmp_path, deaf, deaf, fails),
            remote=Remote(),
            limits=QUICK,
            cwd=str(tmp_path),
            output=Heard(),
        )
    for i in (0, 1):
        wait_until_gone(int(wait_for(tmp_path / f"pid{i}")))


def test_killed_by_a_signal_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="ended by SIGKILL"):
        run_plan(
            plan_of(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"),
            remote=Remote(), limits=QUICK, cwd=str(tmp_path), output=Heard(),
        )  # fmt: skip


ORPHANS = """
import os, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open("worker", "w").write(f"{worker.pid}\\n")
{end}
"""


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), 9)", "time.sleep(600)"])
def test_workers_do_not_outlive_their_launcher(tmp_path: Path, end: str) -> None:
    """A launcher's workers, in sessions of their own as torchrun's are, whether it ends well, dies or is stopped."""
    plan = plan_of(tmp_path, ORPHANS.replace("{end}", end))
    with Job(plan, remote=Remote(), limits=QUICK, cwd=str(tmp_path), output=Heard()) as job:
        worker = int(wait_for(tmp_path / "worker"))
        if end == "os._exit(0)":
            job.wait()
        elif "kill" in end:
            with pytest.raises(LaunchError, match="SIGKILL"):
                job.wait()
    wait_until_gone(worker)


def agent(folder: Path, *, silence: float) -> subprocess.Popen[bytes]:
    """An agent without a supervisor, whose command has written its process id."""
    (folder / "waits.py").write_text(
        "import os, time\nopen('pid', 'w').write(f'{os.getpid()}\\n')\ntime.sleep(600)\n"
    )
    job = {
        "argv": [sys.executable, "waits.py"],
        "environment": {},
        "cwd": str(folder),
        "silence": silence,
        "grace": 1,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "mooring.launch.agent"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write((json.dumps(job) + "\n").encode())
    process.stdin.flush()
    return process


@pytest.mark.parametrize("how", ["closed", "silent", "killed"])
def test_a_command_does_not_outlive_its_supervisor(tmp_path: Path, how: str) -> None:
    process = agent(tmp_path, silence=2 if how == "silent" else 60)
    assert process.stdin is not None
    while not (tmp_path / "pid").is_file():  # the supervisor lives until then, however slow this machine is
        process.stdin.write(b'{"asked": 0}\n')
        process.stdin.flush()
        time.sleep(0.1)
    command = int(wait_for(tmp_path / "pid"))
    if how == "closed":
        process.stdin.close()
    elif how == "killed":
        process.kill()
    wait_until_gone(command)
    process.stdin.close()
    process.wait(timeout=120)


def test_what_cannot_be_started_is_named(tmp_path: Path) -> None:
    plan = LaunchPlan("test", (Command(Host("localhost", 1), range(1), ("/no/such/python",)),), 1)
    with pytest.raises(LaunchError, match=r"exit code 127[\s\S]*/no/such/python: No such file"):
        run_plan(plan, remote=Remote(), limits=QUICK, cwd=str(tmp_path), output=Heard())


def test_an_unreachable_host_is_named(tmp_path: Path) -> None:
    """The words after ``ssh`` are a stand-in that behaves like ssh with a host that is not there."""
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\necho 'ssh: connect to host nowhere port 22: No route to host' >&2\nexit 255\n")
    ssh.chmod(0o755)
    plan = LaunchPlan("test", (Command(Host("nowhere", 1), range(1), ("true",)),), 1)
    with pytest.raises(
        LaunchError, match=r"nowhere \(rank 0\): it could not be started there[\s\S]*No route"
    ):
        run_plan(plan, remote=Remote(ssh=(str(ssh),)), limits=QUICK, cwd=str(tmp_path), output=Heard())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, PREEMPTED)])
def test_interrupts_reach_every_rank(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Ctrl-C on the launch, or a scheduler's signal: the ranks end by themselves, with time to save."""
    waits = (
        "import os, signal, time\n"
        "def saved(number, _):\n"
        "    open(f'saved{os.environ[\"RANK\"]}', 'w').write('yes\\n')\n"
        "    os._exit(130 if number == 2 else 75)\n"
        "signal.signal(signal.SIGINT, saved)\nsignal.signal(signal.SIGTERM, saved)\n"
        "open(f'ready{os.environ[\"RANK\"]}', 'w').write('yes\\n')\ntime.sleep(600)\n"
    )
    (tmp_path / "waits.py").write_text(waits)
    starts = (
        "import sys\nfrom mooring.launch.plan import Program, local_plan\n"
        "from mooring.launch.supervisor import Limits, Remote, TakenDownError, relay, run_plan\n"
        "try:\n"
        "    run_plan(local_plan(Program(sys.executable, 'waits', ()), 2), remote=Remote(),\n"
        "             limits=Limits(settle=20, grace=20), cwd='.', output=relay(['localhost']))\n"
        "except KeyboardInterrupt:\n    sys.exit(130)\n"
        "except TakenDownError as err:\n    sys.exit(err.exit_code)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", starts], cwd=tmp_path)
    for rank in (0, 1):
        wait_for(tmp_path / f"ready{rank}")
    process.send_signal(number)
    assert process.wait(timeout=120) == code
    assert [wait_for(tmp_path / f"saved{rank}") for rank in (0, 1)] == ["yes\n", "yes\n"]


def test_a_failed_launch_starts_again_from_its_checkpoint(tmp_path: Path) -> None:
    package = tmp_path / "mooring_stand_in"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text(
        "import sys\nopen('attempts', 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "sys.exit(0 if open('attempts').read().count('\\n') == 3 else 1)\n"
    )
    request = Attempt(
        launcher="local", hosts=(Host("localhost", 1),), words=("train", "data=x"),
        rendezvous=Rendezvous("127.0.0.1"), environment={"PYTHONPATH": str(tmp_path)}, restarts=2,
    )  # fmt: skip
    warnings: list[str] = []
    run_with_restarts(request, cwd=tmp_path, out=Path("run"), warn=warnings.append, limits=QUICK)
    lines = (tmp_path / "attempts").read_text().splitlines()
    assert lines == ["train data=x", "train data=x resume=auto", "train data=x resume=auto"]
    assert [text.splitlines()[-1][-3:] for text in warnings] == ["1 of 2"[-3:], "2 of 2"[-3:]]
    (tmp_path / "attempts").unlink()
    with pytest.raises(LaunchError, match="resume=auto out=run"):
        run_with_restarts(
            replace(request, restarts=1), cwd=tmp_path, out=Path("run"), warn=warnings.append, limits=QUICK
        )
    assert len((tmp_path / "attempts").read_text().splitlines()) == 2


# A launcher that starts its rank again for ever, or hides the rank's exit code behind 1; the rank tells its agent.
_LAUNCHER = """
import subprocess, sys, time
rank = (
    "import sys; from mooring import signs; code = int(sys.argv[1]); "
    "signs.ended(code, 'told by the rank'); sys.exit(code)"
)
open("attempts", "a").write("x")
while True:
    subprocess.run([sys.executable, "-c", rank, sys.argv[1]])
    if sys.argv[2] == "hides":
        sys.exit(1)
"""


@pytest.mark.parametrize(
    ("code", "kind", "starts"),
    [(USER_ERROR, "hides", 1), (USER_ERROR, "restarts", 1), (PREEMPTED, "hides", 2), (HUNG, "hides", 2)],
)
def test_only_what_a_restart_may_mend_is_tried_again(
    tmp_path: Path, code: int, kind: str, starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "launcher.py").write_text(_LAUNCHER)
    plan = LaunchPlan(
        "test",
        (Command(Host("localhost", 1), range(1), (sys.executable, "launcher.py", str(code), kind)),),
        1,
    )
    request = LaunchRequest("local", (Host("localhost", 1),), (), Rendezvous("127.0.0.1"), restarts=1)
    monkeypatch.setattr(LaunchRequest, "plan", lambda self, program=None: plan)
    with pytest.raises(LaunchError, match="told by the rank") as error:
        run_with_restarts(request, cwd=tmp_path, out=Path("run"), warn=lambda text: None, limits=QUICK)
    assert error.value.exit_code == code
    assert (tmp_path / "attempts").read_text() == "x" * starts


def test_a_rank_that_is_stopped_is_named(tmp_path: Path) -> None:
    """It cannot say so itself, and its launcher sees a process that runs."""
    stops = (
        "import os, signal, subprocess, sys\n"
        "rank = ('import os, signal; from mooring import signs; signs.alive(7, \"backward\", 11, 0.0, 0.5); '\n"
        "        'os.kill(os.getpid(), signal.SIGSTOP)')\n"
        "subprocess.run([sys.executable, '-c', rank])\n"
    )
    with pytest.raises(LaunchError) as error:
        run_plan(plan_of(tmp_path, stops), remote=Remote(), limits=QUICK, cwd=str(tmp_path), output=Heard())
    assert error.value.exit_code == HUNG
    text = str(error.value)
    assert "localhost (rank 0): rank 7 (process" in text
    assert "last in 'backward' of step 11: it is stopped by a signal (SIGSTOP)" in text


def test_the_cause_is_told_before_what_it_brought_about(tmp_path: Path) -> None:
    """Whichever ends first: one that lost its partner, one that was told of its mistake, or the partner itself."""
    ends = "import sys, time; from mooring import signs; time.sleep({}); signs.ended({}, {!r}); sys.exit({})"
    plan = plan_of(
        tmp_path,
        ends.format(0.1, USER_ERROR, "rank 1 stopped: ConfigError: because", USER_ERROR),
        ends.format(0.2, USER_ERROR, "because", USER_ERROR),
        ends.format(0, LOST, "rank 2 of 3 lost another one", LOST),
    )
    limits = replace(QUICK, settle=20)
    with pytest.raises(LaunchError) as error:
        run_plan(plan, remote=Remote(), limits=limits, cwd=str(tmp_path), output=Heard())
    assert error.value.exit_code == USER_ERROR
    assert str(error.value) == "localhost (rank 1): because"


@pytest.mark.parametrize(("fails", "fatal"), [(1, False), (0, True)])
def test_a_job_goes_on_with_as_many_as_suffice(tmp_path: Path, fails: int, fatal: bool) -> None:
    """With an elastic rendezvous; the first command holds it."""
    ends = ["import time\ntime.sleep(2)\n", "import time\ntime.sleep(2)\n"]
    ends[fails] = "raise SystemExit(1)\n"
    plan = replace(plan_of(tmp_path, *ends), least=1)
    heard = Heard()
    if fatal:
        with pytest.raises(LaunchError, match=r"rank 0\): exit code 1"):
            run_plan(plan, remote=Remote(), limits=QUICK, cwd=str(tmp_path), output=heard)
        return
    run_plan(plan, remote=Remote(), limits=QUICK, cwd=str(tmp_path), output=heard)
    assert heard.texts == {(1, 2): "localhost (rank 1): exit code 1: the job goes on without it\n"}


class Attempt(LaunchRequest):
    """A launch of a stand-in for the training."""

    __slots__ = ()

    @property
    def program(self) -> Program:
        return Program(sys.executable, "mooring_stand_in.cli", self.words, self.environment)


def test_other_hosts_speak_behind_their_name(capsys: pytest.CaptureFixture[str]) -> None:
    write = relay(["node0", "node1"])
    first, second = (Command(Host(name, 1), range(1), ()) for name in ("node0", "node1"))
    write(first, "step 1\r", 1)
    write(second, "half a", 2)
    write(second, " line\nand", 2)
    shown = capsys.readouterr()
    assert shown.out == "step 1\r"
    assert shown.err == "[node1] half a line\n"


def test_descendants_are_found_by_parent() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert child.pid in descendants(os.getpid())
        assert child.pid not in descendants(child.pid)
    finally:
        child.kill()
        child.wait()
