"""What differs between a saved run and this machine: listed, refused, or accepted and recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_cases import STOPS, make_config, run, write_inputs
from typer.testing import CliRunner

from mooring.cli import app
from mooring.config.schema import RunConfig
from mooring.errors import RunFolderError
from mooring.report.metrics_log import read_metrics
from mooring.state.store import checkpoints_of
from mooring.train import exactness
from mooring.train.engine import Engine
from mooring.train.exactness import Difference, differences


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run that was stopped in its second epoch."""
    monkeypatch.setenv("MOORING_CACHE", str(tmp_path / "cache"))
    write_inputs(tmp_path)
    config = make_config(tmp_path, tmp_path / "run", "fine_tune", "torch")
    assert run(config, {}, STOPS["mid_epoch"])
    return config


def mooring(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def pretend_other_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = exactness.package_versions
    monkeypatch.setattr(exactness, "package_versions", lambda: real() | {"torch": "1.0"})


def test_each_kind_of_difference() -> None:
    saved = {
        "environment": {"torch": "2.13.0", "Python": "3.11.7", "processes": "2", "CUDA": "13.0"},
        "data": "0123456789abcdef",
        "config": {"optimizer.lr": "0.1", "train.epochs": "2"},
    }
    now = {
        "environment": {"torch": "2.12.0", "Python": "3.12.0", "processes": "1"},
        "data": "0123456789abcdef"[::-1],
        "config": {"optimizer.lr": "0.2", "train.epochs": "2"},
    }
    assert differences(saved, saved) == []
    assert differences(saved, now) == [
        Difference("torch", "2.13.0", "2.12.0", breaks=True),
        Difference("Python", "3.11.7", "3.12.0", breaks=False),
        Difference("processes", "2", "1", breaks=True),
        Difference("CUDA", "13.0", "absent", breaks=True),
        Difference("data", "0123456789ab", "fedcba987654", breaks=True),
        Difference("optimizer.lr", "0.1", "0.2", breaks=True),
    ]
    for wrong in ({}, {**saved, "config": None}, {**saved, "data": 3}):
        with pytest.raises(ValueError, match="Error: "):
            differences(wrong, now)


def test_the_check_lists_and_changes_nothing(stopped: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file: file.read_bytes() for file in stopped.out.rglob("*") if file.is_file()}
    same = mooring("resume", stopped.out, "--check")
    assert same.exit_code == 0, same.output
    assert "would continue bit for bit from step 5 (stopped)" in same.stdout
    free = mooring(
        "resume", stopped.out, "--check", "checkpoint.every=1", "report.log_every=1", "data.workers=2"
    )
    assert free.exit_code == 0, free.output
    pretend_other_torch(monkeypatch)
    threads = torch.get_num_threads() + 1
    other = mooring("resume", stopped.out, "--check", f"train.threads={threads}", "optimizer.lr=0.5")
    torch.set_num_threads(threads - 1)
    assert other.exit_code == 1
    rows = {line.split()[1]: line for line in other.stdout.splitlines() if line.startswith("│")}
    assert {"torch", "train.threads", "optimizer.lr"} <= set(rows)
    assert "1.0" in rows["torch"] and "0.5" in rows["optimizer.lr"]
    assert "CPU threads" in other.stdout and "--allow-inexact goes on" in other.stdout
    assert before == {file: file.read_bytes() for file in stopped.out.rglob("*") if file.is_file()}


def test_exact_mode_refuses_with_the_list_and_inexact_is_recorded(
    stopped: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_other_torch(monkeypatch)
    resumed = stopped.model_copy(update={"resume": "auto"})
    before = (stopped.out / "metrics.jsonl").read_bytes()
    refused = mooring("resume", stopped.out)
    assert refused.exit_code == 2
    assert "would not continue bit for bit" in refused.stderr and "now 1.0" in refused.stderr
    assert "--allow-inexact" in refused.stderr
    assert (stopped.out / "metrics.jsonl").read_bytes() == before
    assert not run(resumed.model_copy(update={"allow_inexact": True}), {})
    result = json.loads((stopped.out / "result.json").read_text())
    assert result["interrupted"] is False
    (recorded,) = result["inexact"]
    assert recorded["step"] == 5 and len(recorded["differences"]) == 1
    assert recorded["differences"][0].startswith("torch: saved 2.")
    (note,) = [record for record in read_metrics(stopped.out) if record.kind == "note"]
    assert note.step == 5 and note.values["inexact"] == recorded["differences"]
    found = checkpoints_of(stopped.out).newest()
    assert checkpoints_of(stopped.out).read(found.ref, "shared")["inexact"] == [recorded]
    assert "allow_inexact = false" in (stopped.out / "config.toml").read_text()


def test_other_data_cannot_be_continued_even_inexactly(stopped: RunConfig, tmp_path: Path) -> None:
    next((tmp_path / "photos" / "train" / "class_0").iterdir()).unlink()
    resumed = stopped.model_copy(update={"resume": "auto", "allow_inexact": True})
    before = {file: file.read_bytes() for file in stopped.out.rglob("*") if file.is_file()}
    with pytest.raises(
        RunFolderError, match=r"cannot be continued by this run.*loader state.*(?s:.*)data: saved"
    ):
        Engine.build(resumed).fit()
    assert before == {file: file.read_bytes() for file in stopped.out.rglob("*") if file.is_file()}


def test_another_model_cannot_be_continued_even_inexactly(stopped: RunConfig) -> None:
    model = stopped.model.model_copy(update={"name": "test_vit", "weights": "none"})
    resumed = stopped.model_copy(update={"resume": "auto", "allow_inexact": True, "model": model})
    with pytest.raises(RunFolderError, match=r"cannot be continued by this run"):
        Engine.build(resumed).fit()


def test_a_damaged_newest_state_is_passed_over_and_without_a_whole_one_the_run_does_not_start_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOORING_CACHE", str(tmp_path / "cache"))
    write_inputs(tmp_path)
    saving = {"every": 1, "keep_last": 2, "background": False}
    config = make_config(tmp_path, tmp_path / "run", "fine_tune", "torch", checkpoint=saving)
    assert run(config, {}, STOPS["mid_epoch"])
    store = checkpoints_of(tmp_path / "run")
    assert [(ref.step, ref.reason) for ref in store.refs()] == [(5, "step 5"), (4, "step 4")]

    def harm(step: int) -> None:
        file = store.folder / f"step-{step}" / "shared.safetensors"
        file.write_bytes(file.read_bytes()[:-1])

    harm(5)
    checked = mooring("resume", tmp_path / "run", "--check")
    assert "step-5 cannot be used" in checked.stderr and "is damaged: expected" in checked.stderr
    assert "would continue bit for bit from step 4 (step 4)" in checked.stdout
    resumed = config.model_copy(update={"resume": "auto"})
    assert run(resumed, {}, STOPS["mid_epoch"])  # step 4 again
    assert (store.folder / "step-5.damaged").is_dir()
    harm(4)
    harm(5)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    refused = mooring("resume", tmp_path / "run")
    assert refused.exit_code == 2 and "none of the saved states is whole" in refused.stderr
    assert mooring("resume", tmp_path / "run", "--check").exit_code == 2
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
