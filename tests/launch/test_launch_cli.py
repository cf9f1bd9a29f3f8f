"""``mooring launch`` and ``mooring preflight`` as a user calls them, up to where processes would start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mooring.cli import app


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("node0 slots=2\nnode1 slots=2\n")


def run(*words: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(words))


def test_a_dry_run_prints_the_commands_of_every_host() -> None:
    result = run("launch", "--hostfile", "hosts", "quick", "data=photos", "--dry-run")
    assert result.exit_code == 0
    assert "# node1: ranks 2-3" in result.stdout
    runs = [word for word in result.stdout.split() if word.startswith("out=")]
    assert len(runs) == 2  # all hosts are told one run folder, though none was given
    assert len(set(runs)) == 1
    assert (
        run("launch", "--hostfile", "hosts", "--torchrun", "data=photos", "--dry-run").stdout.count(
            "torch.distributed.run"
        )
        == 2
    )


def test_an_option_that_switches_off_is_an_option() -> None:
    assert run("launch", "--hostfile", "hosts", "--no-preflight", "data=photos", "--dry-run").exit_code == 0


def test_a_slurm_dry_run_prints_the_script_alone() -> None:
    result = run(
        "launch", "--slurm", "--nodes", "2", "--processes", "4", "data=photos", "out=first", "--dry-run"
    )
    assert result.exit_code == 0
    assert result.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=first\n")
    assert not Path("first.sbatch").exists()


def test_without_slurm_the_script_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    result = run("launch", "--slurm", "--nodes", "2", "data=photos", "out=first")
    assert result.exit_code == 2
    assert "sbatch was not found" in result.stderr
    assert Path("first.sbatch").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch", "--hostfile", "none", "data=photos"], "none cannot be read"),
        (["launch", "--pdsh", "data=photos"], "--pdsh: needs --hostfile"),
        (["launch", "--rendezvous", "etcd", "data=photos"], "expected static or c10d, got etcd"),
        (["launch", "--slurm", "data=photos"], "--nodes: got nothing"),
        (
            ["launch", "--slurm", "--nodes", "1:2", "--rendezvous", "c10d", "data=photos"],
            "allow_inexact=true",
        ),
        (["launch", "train.epoch=3", "data=photos"], "the nearest is train.epochs"),
        (["launch", "--epochs", "3", "data=photos"], "write train.epochs=3"),
        (["preflight", "data=photos", "--env", "x"], "expected NAME=VALUE"),
        (["preflight", "data=photos", "--slurm"], "expected to run inside a Slurm job"),
        (["preflight", "data=photos", "--slurm", "--hostfile", "hosts"], "leave one out"),
        (["preflight", "data=photos", "--processes", "2"], "belongs to --slurm"),
    ],
)
def test_mistakes_are_told_before_anything_starts(words: list[str], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("word", ["--local_rank=1", "--local-rank=1"])
def test_the_word_that_launchers_put_before_the_command_is_no_option(word: str) -> None:
    """DeepSpeed's, as in ``deepspeed --module mooring.cli train``."""
    assert run(word, "launch", "--hostfile", "hosts", "data=photos", "--dry-run").exit_code == 0
    assert "No such option" in run("--local_ranks=1", "launch", "data=photos", "--dry-run").output
