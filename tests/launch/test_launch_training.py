"""One recipe started on two real nodes by every launcher: the losses of one process, and a run that survives a node."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from slurm_cluster import Slurm, require_slurm, slurm
from two_nodes import TwoNodes, require_two_nodes, two_nodes

from mooring.report.metrics_log import read_metrics
from mooring.state.store import CheckpointStore

MOORING = [sys.executable, "-m", "mooring.cli"]
RECIPE = """
method = {name = "dr_tune", bank_size = 12, rotation_period = 2}
[data]
path = "photos"
source = "torch"
workers = 1
[model]
name = "vit_tiny_patch16_224"
weights = "none"
[train]
epochs = 2
batch_size = 6
image_size = 32
eval_size = 32
device = "cpu"
[report]
progress = "quiet"
log_every = 1
plots = false
tensorboard = false
[backend]
timeout_minutes = 5.0
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    require_two_nodes()
    with two_nodes(tmp_path_factory.mktemp("nodes")) as up:
        rng = np.random.default_rng(0)
        for split, count in (("train", 10), ("val", 3), ("test", 2)):
            for label in range(3):
                folder = up.folder / "photos" / split / f"class_{label}"
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = rng.integers(0, 120, (40, 44, 3)) + 60 * label
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        (up.folder / "recipe.toml").write_text(RECIPE)
        up.settings["MOORING_CACHE"] = str(up.folder / "cache")
        yield up


def losses(run: Path) -> list[float]:
    return [record.values["loss"] for record in read_metrics(run) if record.kind == "train"]


@pytest.fixture(scope="module")
def alone(nodes: TwoNodes) -> list[float]:
    """Losses of the recipe on one process, without any launcher."""
    code, output = nodes.run([*MOORING, "train", "recipe.toml", "out=alone"])
    assert code == 0, output
    return losses(nodes.folder / "alone")


@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        pytest.param([], ["backend.zero_stage=1", "method.bank_scope=gathered"], id="deepspeed-1-gathered"),
        pytest.param(
            ["--torchrun"], ["backend.zero_stage=3", "method.bank_scope=sharded"], id="torchrun-3-sharded"
        ),
        pytest.param(
            ["--torchrun", "--rendezvous", "c10d"],
            ["backend.zero_stage=2"],
            id="c10d-2",
            marks=pytest.mark.slow,
        ),
        pytest.param(["--pdsh"], ["backend.zero_stage=1"], id="pdsh-1", marks=pytest.mark.slow),
        pytest.param(
            ["--torchrun"],
            ["backend.name=ddp", "method.bank_scope=sharded"],
            id="torchrun-ddp",
            marks=pytest.mark.slow,
        ),
        pytest.param([], ["backend.zero_stage=3"], id="deepspeed-3-gathered", marks=pytest.mark.slow),
    ],
)
def test_two_nodes_train_as_one_process(
    nodes: TwoNodes,
    alone: list[float],
    launcher: list[str],
    settings: list[str],
    request: pytest.FixtureRequest,
) -> None:
    out = f"run-{request.node.callspec.id}"
    before = nodes.bytes_over_the_cable()
    code, output = nodes.run(
        [
            *MOORING,
            "launch",
            "--hostfile",
            "hosts",
            *([] if "--pdsh" in launcher else ["--no-preflight"]),
            *launcher,
            "recipe.toml",
            *settings,
            f"out={out}",
        ]
    )
    assert code == 0, output
    assert (
        nodes.bytes_over_the_cable() - before > 10 * 5_000_000
    )  # ten steps of five million weights or gradients
    assert losses(nodes.folder / out) == pytest.approx(alone, rel=1e-3)
    for name in ("result.json", "model/model.safetensors", "config.toml"):
        assert (nodes.folder / out / name).is_file()
    assert nodes.wait_until_idle("node0") == nodes.wait_until_idle("node1") == []


# As `mooring launch`, with short waits.
DRIVER = """
import sys
from pathlib import Path
from mooring.launch.attempts import run_with_restarts
from mooring.launch.request import launch_request
from mooring.launch.supervisor import LaunchError, Limits

out, *words = sys.argv[1:]
request = launch_request(
    ["train", "recipe.toml", *words, f"out={out}"], name="lost", hostfile=Path("hosts"), torchrun=True, restarts=3
)
limits = Limits(connect=60, heartbeat=1, silence=10, settle=10, grace=10)
try:
    run_with_restarts(request, cwd=Path.cwd(), out=Path(out), warn=lambda text: print(text, flush=True), limits=limits)
except LaunchError as err:
    sys.exit(f"LAUNCH ERROR {err}")
"""
LONG = ["train.epochs=12", "backend.name=ddp", "method.bank_scope=private", "health.hang_after=20"]


@pytest.fixture(scope="module")
def undisturbed(nodes: TwoNodes) -> list[float]:
    """Losses of the long run on both nodes that nothing happens to."""
    (nodes.folder / "driver.py").write_text(DRIVER)
    code, output = nodes.run([sys.executable, "driver.py", "undisturbed", *LONG])
    assert code == 0, output
    return losses(nodes.folder / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "out"),
    [
        pytest.param("killed", "killed", id="killed"),
        pytest.param("killed", "local/killed", id="killed-on-disks-of-their-own"),
        pytest.param("stopped", "stopped", id="stopped"),
        pytest.param("cut", "local/cut", id="cut-on-disks-of-their-own"),
        pytest.param("switched off", "off", id="switched-off"),
    ],
)
def test_a_lost_rank_is_replaced_and_the_run_goes_on(
    nodes: TwoNodes, undisturbed: list[float], what: str, out: str
) -> None:
    """In the middle, on node1: the launch ends everything, names it, and goes on bit for bit from what was saved."""
    process = nodes.start([sys.executable, "driver.py", out, *LONG])
    disk = "disk-node0/" if out.startswith("local/") else ""
    run = nodes.folder / (disk + out.removeprefix("local/"))
    try:
        deadline = time.monotonic() + 600
        while not any(ref.step >= 10 for ref in CheckpointStore(run / "checkpoints").refs()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
        trainers = _trainers(nodes, "node1")
        assert trainers
        if what == "cut":
            nodes.cut_the_cable()
            try:
                assert nodes.wait_until_idle("node1", seconds=120) == []
            finally:
                nodes.join_the_cable()
        elif what == "switched off":
            nodes.switch_off("node1")
            deadline = time.monotonic() + 180
            while _trainers(nodes, "node0"):
                assert time.monotonic() < deadline, "the ranks of the other node did not end"
                time.sleep(0.1)
            nodes.switch_on("node1")  # the launch has been waiting for it
        else:
            for pid in trainers:
                os.kill(pid, signal.SIGKILL if what == "killed" else signal.SIGSTOP)
        output, _ = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "starting again from the newest checkpoint, restart 1 of 3" in output
    if what == "stopped":
        assert "hangs: nothing has moved for" in output and "where the ranks were:" in output
    assert losses(run) == undisturbed
    assert (run / "result.json").is_file()
    if disk:
        state = nodes.folder / "disk-node1" / out.removeprefix("local/") / "checkpoints" / "step-60"
        assert {file.name for file in state.iterdir()} == {
            "manifest.json",
            "rank-1.json",
            "rank-1.safetensors",
        }


@pytest.mark.slow
def test_a_job_goes_on_with_the_nodes_that_are_left(nodes: TwoNodes) -> None:
    """Node1 loses its power for good: torchrun starts the other one's rank again, and the run says what changed."""
    words = ["--torchrun", "--rendezvous=c10d", "--nodes=1:2", "--restarts=3", "--no-preflight"]
    settings = ["train.epochs=12", "backend.name=ddp", "allow_inexact=true", "out=fewer"]
    process = nodes.start([*MOORING, "launch", "--hostfile", "hosts", *words, "recipe.toml", *settings])
    run = nodes.folder / "fewer"
    try:
        deadline = time.monotonic() + 600
        while not any(ref.step >= 10 for ref in CheckpointStore(run / "checkpoints").refs()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
        nodes.switch_off("node1")
        output, _ = process.communicate(timeout=900)
    finally:
        process.kill()
        nodes.switch_on("node1")
    assert process.returncode == 0, output
    assert "the job goes on without it" in output
    result = json.loads((run / "result.json").read_text())
    assert result["processes"] == 1
    assert [entry["differences"] for entry in result["inexact"]] == [["processes: saved 2, now 1"]]
    assert sorted({record.step for record in read_metrics(run) if record.kind == "train"}) == list(
        range(1, 61)
    )


@pytest.fixture(scope="module")
def cluster(nodes: TwoNodes) -> Iterator[Slurm]:
    """A real Slurm of both nodes."""
    require_slurm()
    with slurm(nodes) as up:
        yield up


def submitted(cluster: Slurm, words: Sequence[str]) -> tuple[str, str]:
    """What became of a job of ``mooring launch --slurm``: its last state and its log."""
    folder = cluster.nodes.folder
    code, output = cluster.nodes.run(
        [*MOORING, "launch", "--slurm", "--nodes=2", "--processes=1", "--gpus-per-node=0", *words],
        environment=cluster.environment,
    )
    assert code == 0, output
    job = output.split()[1]
    state = cluster.wait_for(job)
    return state, next(folder.glob(f"*-{job}.log")).read_text()


@pytest.mark.slow
def test_slurm_runs_the_submitted_script(cluster: Slurm, nodes: TwoNodes, alone: list[float]) -> None:
    state, log = submitted(cluster, ["recipe.toml", "out=by-slurm", "method.bank_scope=sharded"])
    assert state == "COMPLETED", log
    assert "2 of 2 answered" in log and "2 processes by gloo" in log
    assert losses(nodes.folder / "by-slurm") == pytest.approx(alone, rel=1e-3)


@pytest.mark.slow
def test_slurm_ends_a_job_whose_nodes_are_not_ready(cluster: Slurm, nodes: TwoNodes) -> None:
    """One node lacks the data."""
    shutil.copytree(nodes.folder / "photos", nodes.folder / "disk-node0" / "photos")
    state, log = submitted(cluster, ["recipe.toml", "data=local/photos", "out=not-ready"])
    assert state == "FAILED", log
    assert "no data there" in log and "the hosts are not ready: 1 of the lines" in log
    assert not (nodes.folder / "not-ready").exists()


@pytest.mark.slow
def test_slurm_runs_the_plain_script(
    cluster: Slurm, nodes: TwoNodes, alone: list[float], repository: Path
) -> None:
    """launch/slurm.sbatch, submitted by hand."""
    script = str(repository / "launch" / "slurm.sbatch")
    code, output = nodes.run(
        ["sbatch", "--parsable", "--nodes=2", script, "recipe.toml", "out=by-hand"],
        environment={**cluster.environment, "PYTHON": sys.executable},
    )
    assert code == 0, output
    job = output.split()[-1]
    state = cluster.wait_for(job)
    log = (nodes.folder / f"mooring-{job}.log").read_text()
    assert state == "COMPLETED", log
    assert "2 of 2 answered" in log
    assert losses(nodes.folder / "by-hand") == pytest.approx(alone, rel=1e-3)


def _trainers(nodes: TwoNodes, node: str) -> list[int]:
    """Process ids of the ranks on a node, and of what started them."""
    return [pid for pid in nodes.pids(node) if b"mooring.cli" in _command_line(pid)]


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
