"""What must be on the disk before what: every file before its name, every new name with its folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mooring.models.encoder import build_encoder
from mooring.models.export import export
from mooring.models.head import build_head
from mooring.report.records import write_text_atomic
from mooring.report.run_folder import open_run_folder
from mooring.state.encoding import encode_tree
from mooring.state.store import CheckpointStore
from mooring.state.tree import save_tree

Events = list[tuple[str, str]]


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Events:
    """What is synced, made and renamed under ``tmp_path``, in order."""
    seen: Events = []
    fsync, replace, rename, mkdir = os.fsync, Path.replace, Path.rename, Path.mkdir

    def name(path: object) -> str:
        return str(Path(str(path)).relative_to(tmp_path))

    def on_fsync(descriptor: int) -> None:
        seen.append(("sync", name(os.readlink(f"/proc/self/fd/{descriptor}"))))  # noqa: PTH115
        fsync(descriptor)

    def on_replace(self: Path, target: Path) -> Path:
        seen.append((f"name {name(self)}", name(target)))
        return replace(self, target)

    def on_rename(self: Path, target: Path) -> Path:
        seen.append((f"name {name(self)}", name(target)))
        return rename(self, target)

    def on_mkdir(self: Path, *arguments: object, **options: object) -> None:
        mkdir(self, *arguments, **options)  # type: ignore[arg-type]
        seen.append(("make", name(self)))

    monkeypatch.setattr("os.fsync", on_fsync)
    monkeypatch.setattr(Path, "replace", on_replace)
    monkeypatch.setattr(Path, "rename", on_rename)
    monkeypatch.setattr(Path, "mkdir", on_mkdir)
    return seen


def assert_durable(events: Events) -> None:
    """Whatever got a name was synced before; the folder of every new name was synced after."""
    assert events
    for i, (what, path) in enumerate(events):
        parent = str(Path(path).parent)
        if what != "sync":
            assert ("sync", parent) in events[i:], f"{parent} is not synced after: {what} {path}"
        if what.startswith("name "):
            fresh = what.removeprefix("name ")
            assert ("sync", fresh) in events[:i], f"{fresh} is not synced before it is {path}"


def test_small_files(tmp_path: Path, events: Events) -> None:
    write_text_atomic(tmp_path / "config.toml", "x")
    assert_durable(events)


def test_a_run_folder_with_its_parents(tmp_path: Path, events: Events) -> None:
    open_run_folder(tmp_path / "runs" / "a" / "b")
    assert [path for what, path in events if what == "make"] == ["runs", "runs/a", "runs/a/b"]
    assert_durable(events)


def test_checkpoints(tmp_path: Path, events: Events) -> None:
    (tmp_path / "run").mkdir()
    events.clear()
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    for step in (1, 2):
        store.write(step, "x", {"shared": encode_tree({"x": torch.ones(3)})})
    assert ("sync", "run") in events
    assert_durable(events)


def test_trees(tmp_path: Path, events: Events) -> None:
    save_tree(tmp_path / "extra_test" / "sketch", {"x": 1})
    assert_durable(events)


def test_an_exported_model(tmp_path: Path, events: Events) -> None:
    encoder = build_encoder("test_resnet", weights="none")
    export(encoder, build_head(encoder.feature_dim, 2), tmp_path / "run" / "model", ["a", "b"])
    assert_durable(events)
