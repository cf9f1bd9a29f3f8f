"""What differs between a saved run and this machine: listed, refused, or accepted and recorded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resume_cases import MODEL, SOURCE_CLASSES, STOPS, make_config, run, write_inputs
from safetensors.torch import save_file
from typer.testing import CliRunner

from mooring.cli import app
from mooring.config.schema import RunConfig
from mooring.errors import RunFolderError
from mooring.models.torchvision_shim import import_timm
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
    for wrong in ({}, {**saved, "config": None}, {**saved, "data": 3}, {**saved, "inputs": 3}):
        with pytest.raises(ValueError, match="Error: "):
            differences(wrong, now)


def test_inputs_are_compared_by_content_where_both_have_them() -> None:
    facts = {"environment": {}, "data": "d", "config": {}}
    saved = facts | {"inputs": {"model.weights": "w1", "report.unseen": "u1", "data.extra_test.a": "a1"}}
    now = facts | {"inputs": {"model.weights": "w2", "report.unseen": "u2", "data.extra_test.b": "b1"}}
    assert differences(saved, now) == [
        Difference("model.weights", "w1", "w2", breaks=True),
        Difference("report.unseen", "u1", "u2", breaks=True),
    ]
    assert differences(saved, facts) == [Difference("model.weights", "w1", "absent", breaks=True)]


def other_weights(root: Path, file: str = "weights.safetensors") -> None:
    torch.manual_seed(99)
    model = import_timm().create_model(MODEL, num_classes=SOURCE_CLASSES)
    save_file(model.state_dict(), root / file)


def test_other_pretrained_weights_are_seen(stopped: RunConfig, tmp_path: Path) -> None:
    """Also where they are only measured against: the distortion of features is that from the first ones."""
    weights = tmp_path / "weights.safetensors"
    first = weights.read_bytes()
    facts = weights.stat()
    other_weights(tmp_path)
    assert weights.stat().st_size == facts.st_size
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    checked = mooring("resume", stopped.out, "--check")
    assert (
        checked.exit_code == 1 and "model.weights" in checked.stdout and "--allow-inexact" in checked.stdout
    )
    refused = mooring("resume", stopped.out)
    assert refused.exit_code == 2 and "model.weights: saved" in refused.stderr
    (tmp_path / "moved.safetensors").write_bytes(first)
    moved = mooring("resume", stopped.out, "--check", f"model.weights={tmp_path / 'moved.safetensors'}")
    assert moved.exit_code == 0, moved.output


@pytest.mark.parametrize("method", ["tes", "soft_fine_tuning", "tes+dr_tune"])
def test_other_inputs_of_a_method_are_seen_and_moved_ones_are_the_same(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOORING_CACHE", str(tmp_path / "cache"))
    write_inputs(tmp_path)
    config = make_config(tmp_path, tmp_path / "run", method, "torch")
    assert run(config, {}, STOPS["mid_epoch"])
    name, old, new = "method.text", tmp_path / "text.npz", tmp_path / "elsewhere.npz"
    if method == "soft_fine_tuning":
        name, old, new = "method.source_data", tmp_path / "source", tmp_path / "elsewhere"
    old.rename(new)
    moved = mooring("resume", config.out, "--check", f"{name}={new}")
    assert moved.exit_code == 0, moved.output
    if method == "soft_fine_tuning":
        next((new / "train").rglob("*.png")).unlink()
    else:
        arrays = dict(np.load(new))
        np.savez(new, **arrays | {"features": arrays["features"][:, ::-1]})
    checked = mooring("resume", config.out, "--check", f"{name}={new}")
    assert checked.exit_code == 1 and name in checked.stdout
    refused = mooring("resume", config.out, f"{name}={new}")
    assert refused.exit_code == 2 and f"{name}: saved" in refused.stderr
    # the method holds the vectors, the stream of source images a place among them
    assert "cannot be continued" in checked.stdout and "cannot be continued" in refused.stderr


def test_moved_data_and_what_only_watches_are_no_difference(stopped: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "photos", tmp_path / "moved")
    free = ["backend.timeout_minutes=5", "health.spike=none", "health.hang_after=77", "health.max_skips=3"]
    same = mooring("resume", stopped.out, "--check", f"data={tmp_path / 'moved'}", *free)
    assert same.exit_code == 0, same.output
    assert "data.path" not in same.stdout
    # nothing was left out under "stop"; without a guard, steps that nobody looked at may follow
    later = mooring("resume", stopped.out, "--check", "health.nonfinite=skip", "health.max_skips=3")
    assert later.exit_code == 0 and "health.nonfinite" in later.stdout and "health.max_skips" in later.stdout
    other = mooring("resume", stopped.out, "--check", "health.nonfinite=off")
    assert other.exit_code == 1 and "health.nonfinite" in other.stdout


@pytest.mark.parametrize(
    "setting", ["method=dr_tune", "model.name=test_vit", "train.batch_size=4", "data.augment=light"]
)
def test_what_cannot_be_continued_is_not_offered(setting: str, stopped: RunConfig) -> None:
    arguments = [setting, "model.weights=none"] if setting.startswith("model") else [setting]
    before = content(stopped.out)
    checked = mooring("resume", stopped.out, "--check", *arguments)
    assert checked.exit_code == 1
    assert setting.partition("=")[0] in checked.stdout and "cannot be continued" in checked.stdout
    assert "goes on" not in checked.stdout
    refused = mooring("resume", stopped.out, *arguments)
    assert refused.exit_code == 2 and "cannot be continued" in refused.stderr
    assert "--allow-inexact" not in refused.stderr and "out=FOLDER" in refused.stderr
    assert content(stopped.out) == before


def test_the_code_is_what_was_started_not_what_lies_there_at_the_first_save(
    stopped: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    exactness.source_digest.cache_clear()
    engine = Engine.build(stopped.model_copy(update={"resume": "auto"}))

    def updated(name: str) -> Any:
        raise AssertionError("the files are read after the start")

    monkeypatch.setattr(exactness, "import_module", updated)
    assert "mooring" in exactness.run_facts(engine)["environment"]
    engine.close()


def test_deepspeed_is_among_what_computes(stopped: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.build(stopped.model_copy(update={"resume": "auto"})) as engine:
        assert "deepspeed" not in exactness.run_facts(engine)["environment"]
        monkeypatch.setattr(engine.backend, "name", "deepspeed", raising=False)
        assert "deepspeed" in exactness.run_facts(engine)["environment"]


def content(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


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
