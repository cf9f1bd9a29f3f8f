"""A look at parts of a checkpoint: the same values, and nothing read that is not asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mooring.errors import RunFolderError
from mooring.state.encoding import TreeView, encode_tree, read_all
from mooring.state.store import CheckpointRef, CheckpointStore

TREE: dict[str, Any] = {
    "numbers": [1, 2.5, None, True, "text", b"bytes"],
    "inner": {"one": torch.arange(3.0), 7: {"two": torch.tensor(4)}},
    "list": [{"three": torch.ones(2, 2)}, (torch.zeros(0), "x")],
}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[CheckpointStore, CheckpointRef]:
    store = CheckpointStore(tmp_path / "checkpoints")
    return store, store.write(3, "test", {"part": encode_tree(TREE)})


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def test_it_holds_what_was_saved(saved: tuple[CheckpointStore, CheckpointRef]) -> None:
    store, ref = saved
    view = store.view(ref, "part")
    assert isinstance(view["inner"][7], TreeView) and len(view) == 3 and "list" in view
    assert_same(read_all(view), TREE)
    assert_same(read_all(view), store.read(ref, "part"))


def test_a_pipe_in_the_place_of_the_tensors_keeps_nobody_waiting(
    saved: tuple[CheckpointStore, CheckpointRef], no_waiting: None
) -> None:
    store, ref = saved
    (ref.folder / "part.safetensors").unlink()
    os.mkfifo(ref.folder / "part.safetensors")
    with pytest.raises(RunFolderError, match="not a regular file"):
        store.view(ref, "part")


def test_only_what_is_asked_for_is_read(
    saved: tuple[CheckpointStore, CheckpointRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ref = saved
    view = store.view(ref, "part")
    read: list[str] = []
    real = type(view._tensors).__getitem__
    monkeypatch.setattr(
        type(view._tensors), "__getitem__", lambda self, name: read.append(name) or real(self, name)
    )
    assert view["numbers"][:3] == [1, 2.5, None] and list(view["inner"]) == ["one", 7]
    before = len(read)  # the bytes
    assert view["inner"][7]["two"] == 4
    assert len(read) == before + 1


def test_what_is_not_of_this_form_is_a_typed_error(saved: tuple[CheckpointStore, CheckpointRef]) -> None:
    store, ref = saved
    with pytest.raises(RunFolderError, match="has no rank-1"):
        store.view(ref, "rank-1")
    store.check(ref)
    tensors = ref.folder / "part.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(RunFolderError, match="is damaged: expected"):
        store.check(ref)
    with pytest.raises(RunFolderError, match="cannot read"):
        store.view(ref, "part")


@pytest.mark.parametrize(
    "entry", [{"tensor": "t9"}, {"odd": 1}, {"int": "x"}, {"dict": 3}, {"dict": [[1]]}, {"bytes": 4}, {}]
)
def test_a_wrong_entry_is_a_value_error_when_it_is_looked_at(tmp_path: Path, entry: Any) -> None:
    from mooring.state.encoding import document_bytes, tensor_bytes, view_tree

    encoded = encode_tree(TREE)
    (tmp_path / "t").write_bytes(b"".join(bytes(piece) for piece in tensor_bytes(encoded)))
    document = json.loads(document_bytes(encoded))
    document["dict"].append(["wrong", entry])
    view = view_tree(json.dumps(document).encode(), tmp_path / "t")
    assert view["inner"]["one"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError):
        read_all(view["wrong"])
    with pytest.raises(ValueError, match="expected a dict"):
        view_tree(b'{"int": "3"}', tmp_path / "t")
