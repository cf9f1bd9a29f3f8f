"""Runs that go on where the best epoch's weights, the exported model or the test belong to another state."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from resume_cases import (
    STOPS,
    Crash,
    Ids,
    _ask_to_stop,
    _crash,
    _in_step,
    assert_equal,
    make_config,
    outcome,
    run,
    write_inputs,
)
from typer.testing import CliRunner

from mooring.cli import app
from mooring.config.schema import RunConfig
from mooring.errors import RunFolderError
from mooring.report.metrics_log import read_metrics
from mooring.state.store import checkpoints_of
from mooring.state.tree import load_tree
from mooring.train import fit
from mooring.train.checkpoint import Checkpoints
from mooring.train.engine import Engine
from mooring.train.selection import BestEpoch


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of runs in which every epoch is the best one so far."""
    monkeypatch.setenv("MOORING_CACHE", str(tmp_path / "cache"))
    write_inputs(tmp_path)
    offer = BestEpoch.offer

    def always(self: BestEpoch, epoch: int, result: Any) -> bool:
        offer(self, epoch, result)
        self.epoch, self.top1, self.nll = epoch, result.top1, result.nll
        return True

    monkeypatch.setattr(BestEpoch, "offer", always)
    return tmp_path


def config_of(inputs: Path, name: str, **changes: Any) -> RunConfig:
    changes = {
        "checkpoint": {"every": 1, "keep_last": 3, "background": False},
        "train": {"epochs": 3},
    } | changes
    return make_config(inputs, inputs / name, "fine_tune", "torch", **changes)


def resumed(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"resume": "auto", **changes})


def mooring(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "400"}).invoke(app, [str(argument) for argument in arguments])


def exported(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "model").iterdir()}


def assert_as_undisturbed(inputs: Path, config: RunConfig, ids: Ids) -> None:
    whole, seen = config.model_copy(update={"out": inputs / "whole"}), {}
    assert not run(whole, seen)
    assert_equal(outcome(inputs / "whole"), outcome(config.out))
    assert exported(inputs / "whole") == exported(config.out)
    assert seen == ids


def killed_before(where: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine], None]:
    """The process is gone in the second epoch, whose weights are kept, before its checkpoint or its model."""

    def arrange(engine: Engine) -> None:
        owner, name = (Checkpoints, "save") if where == "checkpoint" else (fit, "write_model")
        real = getattr(owner, name)

        def dying(*arguments: Any, **options: Any) -> Any:
            if "epoch 2" in arguments or (where == "model" and engine.best.epoch == 1):
                monkeypatch.setattr(owner, name, real)
                raise Crash
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, dying)

    return arrange


@pytest.mark.parametrize("where", ["checkpoint", "model"])
def test_killed_between_the_best_weights_and_what_goes_with_them(
    where: str, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, ids = config_of(inputs, "run"), {}
    assert run(config, ids, killed_before(where, monkeypatch))
    assert load_tree(config.out / "best")["epoch"] == 1
    assert checkpoints_of(config.out).newest().ref.step == 5
    # preempted in the sixth step: it ends as a preemption does, with the best weights of the state that it saves
    assert run(resumed(config), ids, lambda engine: _in_step(engine, _ask_to_stop, 5, 0))
    assert json.loads((config.out / "result.json").read_text())["best_epoch"] == 0
    assert load_tree(config.out / "best")["epoch"] == 0
    assert json.loads((config.out / "model" / "epoch.json").read_text())["epoch"] == 0
    assert not run(resumed(config), ids)
    assert_as_undisturbed(inputs, config, ids)


def test_from_any_checkpoint_that_is_kept_it_ends_the_same(inputs: Path) -> None:
    keeping = {"every": 1, "keep_last": 1, "keep_every": 2, "background": False}
    config, ids = config_of(inputs, "run", checkpoint=keeping), {}
    assert not run(config, ids)
    shutil.copytree(config.out, inputs / "copy")
    store = checkpoints_of(config.out)
    assert [ref.step for ref in store.refs()] == [9, 8, 6, 4, 2]
    assert {entry.name for entry in config.out.glob("best*")} == {"best", "best-1", "best-2"}
    for newest in (6, 2):  # what is newer is damaged
        for ref in store.refs():
            if ref.step > newest:
                (ref.folder / "shared.json").write_text("")
        assert not run(resumed(config), ids)
    assert_as_undisturbed(inputs, config, ids)
    # or set aside, as a program does that takes another course from an older one
    shutil.rmtree(config.out)
    shutil.move(inputs / "copy", config.out)
    with Engine.build(resumed(config)) as engine:
        engine.resume(store.refs()[2])
        saved = engine.save("another course")
    assert [ref.folder.name for ref in store.refs()] == ["step-6-1", "step-4", "step-2"]
    assert store.newest().ref == saved and (store.folder / "step-9.later").is_dir()
    assert load_tree(config.out / "best")["epoch"] == 1
    assert load_tree(config.out / "best-3.later")["epoch"] == 2
    assert not run(resumed(config), ids)
    assert_equal(outcome(inputs / "whole"), outcome(config.out))


def test_damaged_best_weights_are_noticed_before_anything_is_trained(inputs: Path) -> None:
    config, ids = config_of(inputs, "run", checkpoint={"every": 2, "keep_last": 3, "background": False}), {}
    assert run(config, ids, STOPS["mid_epoch"])
    store = checkpoints_of(config.out)
    assert [ref.step for ref in store.refs()] == [5, 4, 3]
    store.write(2, "kept", {}, facts={"best_epoch": None})  # as keep_every would
    file = config.out / "best" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    before = {file: file.read_bytes() for file in config.out.rglob("*") if file.is_file()}
    for words in (["--check"], []):
        refused = mooring("resume", config.out, *words)
        assert refused.exit_code == 2, refused.output
        says = " ".join(refused.stderr.replace("│", " ").split())
        assert "the weights of epoch 1, the best one when" in says and "is damaged: expected" in says
        assert "and continue from there (step 2): what followed is trained again" in says
    assert before == {file: file.read_bytes() for file in config.out.rglob("*") if file.is_file()}


def test_an_extended_run_that_selects_another_epoch_is_tested_anew(inputs: Path) -> None:
    extra = {"extra_test": {"again": inputs / "photos"}}
    config = config_of(inputs, "run", data=extra, train={"epochs": 1})
    assert not run(config, {})
    longer = config.model_copy(
        update={"allow_inexact": True, "train": config.train.model_copy(update={"epochs": 2})}
    )
    for _ in range(2):  # the second time it is finished already
        result = Engine.build(resumed(longer)).fit()
        assert result.best_epoch == 1
        assert result.test_looks == {"test": 2, "test/again": 2}
        for name in ("test", "extra_test/again"):
            kept = load_tree(config.out / name)
            assert kept["of"]["epoch"] == 1 and kept["looks"] == 2
        notes = [
            record.values.get("note", "") for record in read_metrics(config.out) if record.kind == "note"
        ]
        assert sum("was looked at 2 times: other weights were selected" in note for note in notes) == 2
    assert json.loads((config.out / "result.json").read_text())["test_looks"]["test"] == 2


def test_a_run_whose_checkpoints_were_deleted_is_not_wiped(inputs: Path) -> None:
    config = config_of(inputs, "run", checkpoint={"keep_last": 1}, train={"epochs": 1})
    # killed before anything was saved: it starts anew
    assert run(config, {}, lambda engine: _in_step(engine, _crash, 2, 0))
    assert not (config.out / "checkpoints").exists() and read_metrics(config.out)[-1].step == 2
    assert not run(resumed(config), {})
    shutil.rmtree(config.out / "checkpoints")
    before = {file: file.read_bytes() for file in config.out.rglob("*") if file.is_file()}
    for forgotten in ((), ("result.json",)):
        for name in forgotten:
            (config.out / name).unlink()
            del before[config.out / name]
        with pytest.raises(
            RunFolderError, match=r"was trained and saved, but .*checkpoints holds no checkpoint"
        ):
            Engine.build(resumed(config)).fit()
        assert mooring("resume", config.out, "--check").exit_code == 2
    assert before == {file: file.read_bytes() for file in config.out.rglob("*") if file.is_file()}
