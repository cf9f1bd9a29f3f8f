"""Launches over ssh on two real nodes: namespaces of one machine, each with its own name, address and ssh server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from two_nodes import TwoNodes, require_two_nodes, two_nodes

MOORING = [sys.executable, "-m", "mooring.cli"]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    require_two_nodes()
    with two_nodes(tmp_path_factory.mktemp("nodes")) as up:
        (up.folder / "photos").mkdir()
        (up.folder / "photos" / "x.jpg").write_bytes(b"1")
        yield up


def test_the_nodes_are_two(nodes: TwoNodes) -> None:
    code, output = nodes.run(["ssh", "node1", "hostname"], timeout=180)
    assert (code, output) == (0, "node1\n")


@pytest.mark.parametrize(
    "launcher",
    [pytest.param([], id="deepspeed"), pytest.param(["--torchrun"], id="torchrun", marks=pytest.mark.slow)],
)
def test_preflight_finds_both_ready(nodes: TwoNodes, launcher: list[str]) -> None:
    """Facts over ssh, the port across the cable, and an all-reduce started as a training would be."""
    before = nodes.bytes_over_the_cable()
    code, output = nodes.run(
        [*MOORING, "preflight", "--hostfile", "hosts", *launcher, "data=photos", "model.weights=none"]
    )
    assert code == 0, output
    assert "2 of 2 answered" in output
    assert "2 processes by gloo" in output
    assert nodes.bytes_over_the_cable() - before > 5 * (4 << 20)  # five sums of 4 MiB


def test_preflight_names_what_is_wrong_where(nodes: TwoNodes) -> None:
    (nodes.folder / "three").write_text("node0 slots=1\nnode1 slots=1\nnode2 slots=1\n")
    code, output = nodes.run(
        [*MOORING, "preflight", "--hostfile", "three", "data=none", "model.weights=none"],
        environment={"COLUMNS": "200"},
    )
    assert code == 2
    assert "node2" in output
    assert "Could not resolve hostname" in output
    assert output.count("no data there") == 2
    assert "the hosts are not ready: 3 of the lines" in output


# ---------------------------------------------------------------- lost nodes

ENDLESS = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from mooring.train.health.heartbeat import Heartbeat, Phase
dist.init_process_group("gloo")
rank = dist.get_rank()
phase = Phase()
with Heartbeat(phase, Path(f"run{rank}"), rank, hang_after=float(sys.argv[1]), abort=True):
    while True:
        phase.enter("step")
        dist.all_reduce(torch.ones(1))
        phase.step += 1
        phase.steps_begun += 1
        if phase.step == 3:
            with open(f"ready{rank}.tmp", "w") as file:
                file.write(f"{os.getpid()}\\n")
            os.rename(f"ready{rank}.tmp", f"ready{rank}")
        time.sleep(0.01)
"""
DRIVER = """
import sys
from dataclasses import replace
from pathlib import Path
from mooring.launch.attempts import run_with_restarts
from mooring.launch.plan import Program
from mooring.launch.request import LaunchRequest, launch_request
from mooring.launch.supervisor import LaunchError, Limits

class Endless(LaunchRequest):
    __slots__ = ()
    @property
    def program(self):
        return Program(sys.executable, "endless", self.words, self.environment)

asked = launch_request([sys.argv[1]], name="x", hostfile=Path("hosts"), torchrun=sys.argv[2] == "torchrun")
request = Endless(**{name: getattr(asked, name) for name in LaunchRequest.__dataclass_fields__})
limits = Limits(connect=120, heartbeat=0.5, silence=10, settle=3, grace=3)
try:
    run_with_restarts(request, cwd=Path.cwd(), out=Path("run"), warn=print, limits=limits)
except LaunchError as err:
    print("LAUNCH ERROR", err, flush=True)
    sys.exit(2)
"""


def endless(
    nodes: TwoNodes, *, launcher: str, hang_after: float = 600
) -> tuple[subprocess.Popen[str], list[int]]:
    """A job that sums for ever, past its third step: the launch, and the process id of each rank."""
    for rank in (0, 1):
        (nodes.folder / f"ready{rank}").unlink(missing_ok=True)
    (nodes.folder / "endless.py").write_text(ENDLESS)
    (nodes.folder / "driver.py").write_text(DRIVER)
    process = nodes.start([sys.executable, "driver.py", f"{hang_after:g}", launcher])
    files = [nodes.folder / f"ready{rank}" for rank in (0, 1)]
    deadline = time.monotonic() + 400
    while not all(file.is_file() for file in files):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the job did not start"
        time.sleep(0.05)
    return process, [int(file.read_text()) for file in files]


def ended(nodes: TwoNodes, process: subprocess.Popen[str]) -> str:
    """Waits for the launch to fail, as it must within its limits; nothing of it may be left on node0."""
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 2, output
    assert "LAUNCH ERROR" in output
    assert nodes.wait_until_idle("node0") == []
    return output


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_job_everywhere(nodes: TwoNodes, launcher: str) -> None:
    process, (_, rank1) = endless(nodes, launcher=launcher)
    os.kill(rank1, signal.SIGKILL)
    output = ended(nodes, process)
    # either node may be the first to fail: the ranks that lose their partner end with an error, too
    assert "LAUNCH ERROR node" in output
    assert "what was saved is in run" in output
    assert nodes.wait_until_idle("node1") == []


def test_a_stopped_rank_ends_the_job_everywhere(nodes: TwoNodes) -> None:
    """SIGSTOP: the process is there and its node answers; it is silent, and its partners stand still."""
    process, (_, rank1) = endless(nodes, hang_after=4, launcher="torchrun")
    os.kill(rank1, signal.SIGSTOP)
    output = ended(nodes, process)
    assert "rank 0 on node0: in 'step' of step " in output
    assert "rank 0 hangs: nothing has moved for" in output  # it says so itself, with its stack
    assert "all_reduce" in (nodes.folder / "run0" / "heartbeat" / "hang-rank-0.txt").read_text()
    assert "rank 1 on node1: in '" in output
    assert nodes.wait_until_idle("node1") == []


def test_a_cut_cable_ends_the_job_on_both_sides(nodes: TwoNodes) -> None:
    """Nobody closes a connection: each side knows the other only by its silence."""
    process, _ = endless(nodes, launcher="torchrun")
    nodes.cut_the_cable()
    try:
        output = ended(nodes, process)
        assert "node1 (rank 1): nothing was heard from it for 10 s" in output
        assert nodes.wait_until_idle("node1") == []
    finally:
        nodes.join_the_cable()


@pytest.mark.slow
def test_a_node_without_power_ends_the_job(nodes: TwoNodes) -> None:
    process, _ = endless(nodes, launcher="torchrun")
    nodes.switch_off("node1")
    try:
        output = ended(nodes, process)
        assert "LAUNCH ERROR node" in output
        assert "node1 (rank 1): the connection was closed" in output
    finally:
        nodes.switch_on("node1")
