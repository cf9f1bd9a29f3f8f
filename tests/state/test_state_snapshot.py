from __future__ import annotations

import threading

import pytest
import torch

from mooring.state.background import Background
from mooring.state.encoding import decode_tree, document_bytes, tensor_bytes
from mooring.state.snapshot import HostMemory


def test_a_snapshot_does_not_follow_the_run_and_its_memory_is_used_again() -> None:
    weights = torch.arange(6.0).reshape(2, 3).to(memory_format=torch.contiguous_format)
    tree = {"a": {"weights": weights.T, "again": weights.T}, "b": {"step": 1, "weights": weights}}
    memory = HostMemory()
    first = memory.take(tree)
    wanted = weights.clone()
    weights.zero_()
    for part, key, expected in (("a", "weights", wanted.T), ("b", "weights", wanted)):
        read = decode_tree(document_bytes(first[part]), b"".join(tensor_bytes(first[part])))
        assert torch.equal(read[key], expected)
    places = {tensor.data_ptr() for part in first.values() for tensor in part.tensors.values()}
    assert len(places) == 2  # one copy of each part's tensor
    second = memory.take(tree)
    assert {tensor.data_ptr() for part in second.values() for tensor in part.tensors.values()} == places
    tree["b"]["weights"] = torch.ones(7)
    assert memory.take(tree)["b"].tensors["t0"].shape == (7,)


def test_work_in_the_background_comes_one_by_one_and_its_errors_come_back() -> None:
    background, gate, done = Background(), threading.Event(), []
    background.check()
    background.start(lambda: (gate.wait(), done.append(1)))
    background.check()  # under way: nothing to say
    assert done == []
    gate.set()
    background.start(lambda: done.append(2))  # waits for the first
    background.wait()
    assert done == [1, 2]

    def fails() -> None:
        raise OSError("no")

    background.start(fails)
    with pytest.raises(OSError, match="no"):
        background.start(lambda: done.append(3))
    assert done == [1, 2]
    background.start(fails)
    with pytest.raises(OSError, match="no"):
        background.wait()
    background.wait()  # said once
