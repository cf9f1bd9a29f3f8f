"""Two ranks write a checkpoint, and one of them is killed at each stage of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mooring.distributed import Ranks
from mooring.errors import RunFolderError
from mooring.state.encoding import encode_tree
from mooring.state.retention import Retention
from mooring.state.store import CheckpointRef, CheckpointStore

OF_ALL = ("write rank-{}.safetensors", "write rank-{}.json", "wait for the other ranks")
OF_FIRST = (
    "make the folder",
    "write the manifest",
    "sync the folder",
    "rename",
    "sync the parent",
    "replace the pointer",
    "delete old checkpoints",
    "remove",
    "done",
)
_COMMITTED = OF_FIRST[OF_FIRST.index("sync the parent") :]
CASES = [(rank, stage.format(rank)) for rank in (0, 1) for stage in OF_ALL] + [
    (0, stage) for stage in OF_FIRST
]
# the others are those of one process: test_state_store.py
ALWAYS = {(1, stage.format(1)) for stage in OF_ALL} | {
    (0, "wait for the other ranks"),
    (0, "sync the parent"),
}


def write(store: CheckpointStore, step: int, before: Callable[[], None] = lambda: None) -> CheckpointRef:
    rank = store.ranks.rank
    parts = {f"rank-{rank}": encode_tree({"x": torch.full((1000,), 10.0 * step + rank)})}
    return store.write(step, "test", parts, before=before)


def write_two(rank: int, folder: Path, meeting: Path, fatal: tuple[int, str] | None, wrong: str) -> None:
    """One rank: a checkpoint of step 1 and one of step 2, in which the fatal rank is killed at the fatal stage."""
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )

    first_stands = False

    def stage(name: str) -> None:
        if first_stands and (rank, name) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        if first_stands and wrong == "write" and (rank, name) == (1, OF_ALL[0].format(1)):
            raise OSError(28, "No space left on device")

    def sync_log() -> None:
        if wrong == "log" and rank == 0:
            raise OSError(28, "No space left on device")

    store = CheckpointStore(folder, Ranks.here(), keep=Retention(last=1), stage=stage)
    write(store, 1)
    first_stands = True
    try:
        write(store, 2, sync_log)
    except RunFolderError as err:
        (meeting.parent / f"refused-{rank}").write_text(str(err))


def run_two(folder: Path, fatal: tuple[int, str] | None, *, wrong: str = "") -> list[int]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "mooring.state.store", "mooring.state.encoding"])
    processes = [
        context.Process(target=write_two, args=(rank, folder / "c", folder / "meeting", fatal, wrong))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    processes[fatal[0] if fatal else 0].join(120)
    processes[1 - fatal[0] if fatal else 1].join(20 if fatal else 120)  # may wait for the one that is gone
    for process in processes:
        process.kill()
        process.join()
    return [int(process.exitcode or 0) for process in processes]


def assert_whole(folder: Path, step: int) -> None:
    store = CheckpointStore(folder / "c")
    found = store.newest()
    assert found.ref is not None and found.ref.step == step and not found.damaged
    assert store.facts(found.ref)["world"] == 2
    for rank in (0, 1):
        assert torch.equal(
            store.read(found.ref, f"rank-{rank}")["x"], torch.full((1000,), 10.0 * step + rank)
        )


@pytest.mark.parametrize(
    "fatal",
    [
        pytest.param(case, marks=() if case in ALWAYS else pytest.mark.slow, id=f"{case[0]}-{case[1]}")
        for case in CASES
    ],
)
def test_whichever_rank_dies_the_newest_is_whole(fatal: tuple[int, str], tmp_path: Path) -> None:
    codes = run_two(tmp_path, fatal)
    assert codes[fatal[0]] == -signal.SIGKILL
    assert_whole(tmp_path, 2 if fatal[1] in _COMMITTED else 1)


@pytest.mark.parametrize("wrong", ["write", "log"])
def test_a_rank_that_cannot_write_stops_the_others_too(wrong: str, tmp_path: Path) -> None:
    assert run_two(tmp_path, None, wrong=wrong) == [0, 0]
    assert_whole(tmp_path, 1)
    for rank in (0, 1):
        assert "No space left on device" in (tmp_path / f"refused-{rank}").read_text()
    assert not list((tmp_path / "c").glob("*.partial"))
