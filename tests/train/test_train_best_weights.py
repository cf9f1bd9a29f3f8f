"""The best epoch's weights: killed between any two changes of the disk, what a saved state names is found again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mooring.errors import RunFolderError
from mooring.state.encoding import encode_tree
from mooring.state.retention import Retention
from mooring.state.store import CheckpointRef, CheckpointStore
from mooring.state.tree import load_tree
from mooring.train import best_weights

Settle = Callable[[], None]


def tree(epoch: int) -> dict[str, object]:
    return {"epoch": epoch, "method": {"w": torch.full((10,), float(epoch))}, "val": {}}


def saved(store: CheckpointStore, step: int, best: int | None) -> CheckpointRef:
    return store.write(step, "x", {"shared": encode_tree({})}, facts={best_weights.FACT: best})


def names(run: Path) -> list[str]:
    return sorted(entry.name for entry in run.iterdir() if entry.name != "checkpoints")


def killed_at(change: int, act: Callable[[], None]) -> bool:
    """Whether a process that does this was killed before its n-th change of the disk; else it did it all."""
    child = os.fork()
    if child == 0:
        left = [change]

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def changing(*arguments: object, **options: object) -> object:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return real(*arguments, **options)

            return changing

        for place, name in ((os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")):
            setattr(place, name, counted(getattr(place, name)))
        try:
            act()
        finally:
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Epochs 1 and 3 were best; a checkpoint of each is kept."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=Retention(last=2))
    best_weights.keep(tmp_path, tree(0), None)
    saved(store, 3, 0)
    best_weights.keep(tmp_path, tree(2), 0)
    saved(store, 9, 2)
    assert names(tmp_path) == ["best", "best-1"]
    return tmp_path


def go_on(run: Path) -> int:
    """As a run does that goes on: the epoch whose weights it has then."""
    store = CheckpointStore(run / "checkpoints")
    ref = store.newest().ref
    assert ref is not None
    _, epoch = best_weights.best_epoch_of(store, ref)
    best_weights.require(run, epoch, store, ref)
    settle = lambda: best_weights.settle(run, epoch, best_weights.best_epochs(store))  # noqa: E731
    change = 0
    while killed_at(change, settle):  # and every time anew
        best_weights.require(run, epoch, store, ref)
        change += 1
    settle()
    assert torch.equal(load_tree(run / "best")["method"]["w"], torch.full((10,), float(epoch or 0)))
    return load_tree(run / "best")["epoch"]


def test_killed_at_any_change_while_a_better_epoch_is_kept(run: Path) -> None:
    change = 0
    while killed_at(change, lambda: best_weights.keep(run, tree(4), 2)):
        assert go_on(run) == 2, change
        assert names(run) == ["best", "best-1"]
        change += 1
    assert change >= 10
    assert names(run) == ["best", "best-1", "best-3"]
    assert go_on(run) == 2  # nothing names epoch 5 yet
    best_weights.keep(run, tree(4), 2)
    saved(CheckpointStore(run / "checkpoints", keep=Retention(last=2)), 15, 4)
    assert go_on(run) == 4
    assert names(run) == ["best", "best-3"]  # the checkpoint that named epoch 1 is gone


def test_the_weights_of_an_older_state_come_back(run: Path) -> None:
    store = CheckpointStore(run / "checkpoints")
    newest = store.newest().ref
    assert newest is not None
    (newest.folder / "shared.json").write_text("")
    store.tidy(store.newest().damaged)
    assert go_on(run) == 0
    assert names(run) == ["best"]


def test_what_is_set_aside_keeps_its_weights(run: Path) -> None:
    store = CheckpointStore(run / "checkpoints")
    newest, older = store.refs()
    store.set_later_aside(older)
    best_weights.settle(run, 0, best_weights.best_epochs(store), {2})
    assert names(run) == ["best", "best-3.later"]
    assert load_tree(run / "best")["epoch"] == 0 and load_tree(run / "best-3.later")["epoch"] == 2
    assert not newest.folder.exists()


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_missing_weights_are_named_with_what_can_be_done(harm: str, run: Path) -> None:
    store = CheckpointStore(run / "checkpoints")
    newest, _ = store.refs()
    file = run / "best" / "tensors.safetensors"
    if harm == "damaged":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        (run / "best").rename(run / "elsewhere")
    with pytest.raises(RunFolderError, match=r"epoch 3, the best one when .*step-9(?s:.*)or move .*step 3\)"):
        best_weights.require(run, 2, store, newest)
    (run / "best-1").rename(run / "elsewhere-1")
    with pytest.raises(RunFolderError, match=r"back from a copy, or start a new run with out=FOLDER"):
        best_weights.require(run, 2, store, newest)


def test_nothing_is_deleted_where_a_checkpoint_does_not_say(run: Path) -> None:
    store = CheckpointStore(run / "checkpoints", keep=Retention(last=3))
    store.write(10, "by another version", {"shared": encode_tree({})})
    assert best_weights.best_epochs(store) is None
    best_weights.prune(run, best_weights.best_epochs(store))
    assert names(run) == ["best", "best-1"]


def test_a_model_is_of_those_weights_that_were_signed_last(run: Path) -> None:
    model = run / "model"
    model.mkdir()
    best = best_weights.identity(run, 2)
    assert not best_weights.model_is_of(model, best)
    best_weights.sign_model(model, best)
    assert best_weights.model_is_of(model, best)
    best_weights.keep(run, tree(4), 2)
    assert not best_weights.model_is_of(model, best_weights.identity(run, 4))
    best_weights.forget_model(model)
    assert not best_weights.model_is_of(model, best)
