"""One recipe started on two real nodes by every launcher: the losses of one process, and a run that survives a node."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from slurm_cluster import require_slurm, slurm
from two_nodes import TwoNodes, require_two_nodes, two_nodes

from mooring.report.metrics_log import read_metrics

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
            "--no-preflight",
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


@pytest.mark.slow
def test_a_killed_node_is_replaced_and_the_run_goes_on(nodes: TwoNodes) -> None:
    """Killed in the middle on node1: the launch ends the rest and starts again from the newest checkpoint."""
    words = [*MOORING, "launch", "--hostfile", "hosts", "--no-preflight", "--torchrun", "--restarts", "1"]
    process = nodes.start([*words, "recipe.toml", "train.epochs=20", "backend.name=ddp", "out=survivor"])
    run = nodes.folder / "survivor"
    try:
        deadline = time.monotonic() + 300
        while not (run / "checkpoints" / "step-10").is_dir():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
        trainers = [pid for pid in nodes.pids("node1") if b"mooring.cli" in _command_line(pid)]
        assert trainers
        for pid in trainers:
            os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "starting again from the newest checkpoint, restart 1 of 1" in output
    steps = [record.step for record in read_metrics(run) if record.kind == "train"]
    assert sorted(set(steps)) == list(range(min(steps), 100 + min(steps)))
    assert (run / "result.json").is_file()


@pytest.mark.slow
def test_slurm_runs_the_submitted_script(nodes: TwoNodes, alone: list[float]) -> None:
    """A real Slurm of both nodes; ``mooring launch --slurm`` writes and submits."""
    require_slurm()
    with slurm(nodes) as cluster:
        code, output = nodes.run(
            [
                *MOORING, "launch", "--slurm", "--nodes", "2", "--processes", "1", "--gpus-per-node", "0",
                "recipe.toml", "out=by-slurm", "method.bank_scope=sharded",
            ],
            environment=cluster.environment,
        )  # fmt: skip
        assert code == 0, output
        job = output.split()[1]
        state = cluster.wait_for(job)
        log = (nodes.folder / f"by-slurm-{job}.log").read_text()
    assert state == "COMPLETED", log
    assert losses(nodes.folder / "by-slurm") == pytest.approx(alone, rel=1e-3)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
