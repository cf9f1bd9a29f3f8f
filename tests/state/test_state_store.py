"""Checkpoints: killed at every stage of a write, damaged afterwards, on disks that are full or cannot be written."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from mooring.errors import RunFolderError
from mooring.state.encoding import encode_tree
from mooring.state.retention import Retention
from mooring.state.store import MANIFEST, POINTER, CheckpointRef, CheckpointStore, _digest

FILES = ["shared.safetensors", "shared.json", "rank-0.safetensors", "rank-0.json"]
STAGES = [
    "make the folder",
    *(f"write {file}" for file in FILES),
    "wait for the other ranks",
    "write the manifest",
    "sync the folder",
    "rename",
    "sync the parent",
    "replace the pointer",
    "delete old checkpoints",
    "remove",
    "done",
]


def parts(step: int) -> dict[str, Any]:
    return {
        "shared": encode_tree({"step": step, "weights": torch.full((5000,), float(step))}),
        "rank-0": encode_tree({"position": step}),
    }


def write(store: CheckpointStore, step: int, **options: Any) -> CheckpointRef:
    return store.write(step, f"step {step}", parts(step), facts={"torch": "x"}, **options)


def assert_holds(store: CheckpointStore, ref: CheckpointRef | None, step: int) -> None:
    assert ref is not None and ref.step == step
    shared = store.read(ref, "shared")
    assert shared["step"] == step and torch.equal(shared["weights"], torch.full((5000,), float(step)))
    assert store.read(ref, "rank-0") == {"position": step}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_comes_back_bit_for_bit_with_what_was_said_about_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c")
    assert store.newest().ref is None
    ref = write(store, 3, score=(0.1, float("inf")))
    found = store.newest()
    assert found.ref == ref and found.notes == [] and found.damaged == []
    assert found.ref.reason == "step 3" and str(found.ref.score) == "(0.1, inf)"
    assert store.facts(found.ref) == {"torch": "x", "world": 1}
    assert_holds(store, found.ref, 3)
    assert (tmp_path / "c" / POINTER).read_text() == "step-3\n"
    assert names(ref.folder) == sorted([MANIFEST, *FILES])
    with pytest.raises(RunFolderError, match="has no rank-1: it was written by another number of processes"):
        store.read(ref, "rank-1")


def test_a_second_state_of_one_step_does_not_touch_the_first(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=Retention(last=3))
    assert [write(store, 3).folder.name for _ in range(2)] == ["step-3", "step-3-1"]
    assert store.newest().ref.folder.name == "step-3-1"
    write(store, 20)
    write(store, 4)  # order is by step, not by when
    assert [ref.folder.name for ref in store.refs()] == ["step-20", "step-4", "step-3-1"]


def die_at(folder: Path, step: int, fatal: str) -> None:
    """Writes a checkpoint and is killed where ``fatal`` begins."""

    def stage(name: str) -> None:
        if name == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    write(CheckpointStore(folder, keep=Retention(last=1), stage=stage), step)


@pytest.fixture(scope="module")
def processes() -> Any:
    """Fork server with everything imported: a process of it starts in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "mooring.state.store", "mooring.state.encoding"])
    return context


def test_the_stages_are_those_of_a_write(tmp_path: Path) -> None:
    write(CheckpointStore(tmp_path / "c"), 1)
    seen: list[str] = []
    write(CheckpointStore(tmp_path / "c", keep=Retention(last=1), stage=seen.append), 2)
    assert seen == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_stage_the_newest_is_whole(stage: str, tmp_path: Path, processes: Any) -> None:
    folder = tmp_path / "c"
    write(CheckpointStore(folder), 1)
    process = processes.Process(target=die_at, args=(folder, 2, stage))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    store = CheckpointStore(folder, keep=Retention(last=1))
    found = store.newest()
    committed = STAGES.index(stage) > STAGES.index("rename")
    assert_holds(store, found.ref, 2 if committed else 1)
    assert found.damaged == []
    # the process that takes over finds no obstacle, and leaves nothing behind
    store.tidy(found.damaged)
    assert_holds(store, write(store, 2), 2)
    assert_holds(store, store.newest().ref, 2)
    assert names(folder) == [POINTER, "step-2-1" if committed else "step-2"]


def flip(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte % len(content)] ^= 1
    file.write_bytes(content)


HARM: dict[str, Callable[[Path], object]] = {
    "flipped-first": lambda file: flip(file, 0),
    "flipped-middle": lambda file: flip(file, len(file.read_bytes()) // 2),
    "flipped-last": lambda file: flip(file, -1),
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 1),
    "emptied": lambda file: os.truncate(file, 0),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b" "),
    "missing": Path.unlink,
    "folder": lambda file: (file.unlink(), file.mkdir()),
    "pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "device": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
    "link": lambda file: (file.unlink(), file.symlink_to("/proc/self/status")),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_damaged_checkpoint_is_passed_over_and_set_aside(
    name: str, harm: str, tmp_path: Path, no_waiting: None
) -> None:
    store = CheckpointStore(tmp_path / "c")
    write(store, 1)
    broken = write(store, 2).folder
    HARM[harm](broken / name)
    found = store.newest()
    if name == MANIFEST and harm == "longer":  # white space after a JSON value says nothing else
        assert_holds(store, found.ref, 2)
        return
    assert_holds(store, found.ref, 1)
    assert found.damaged == [broken]
    assert "step-2 cannot be used" in found.notes[0] and str(broken) in found.notes[0]
    assert found.notes[1] == "continuing from step-1, the newest checkpoint that is whole"
    store.tidy(found.damaged)
    write(store, 2)
    assert_holds(store, store.newest().ref, 2)
    assert "step-2.damaged" in names(tmp_path / "c")


@pytest.mark.parametrize("pointer", ["step-1\n", "step-7\n", "../elsewhere", "", None])
def test_the_pointer_is_never_trusted(pointer: str | None, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c")
    write(store, 1)
    write(store, 2)
    (store.folder / POINTER).unlink()
    if pointer is not None:
        (store.folder / POINTER).write_text(pointer)
    assert_holds(store, store.newest().ref, 2)
    assert_holds(store, write(store, 3), 3)


def test_no_clock_decides(tmp_path: Path) -> None:
    """The clock was set back by ten years between the two: the second one is older in every time stamp."""
    store = CheckpointStore(tmp_path / "c", keep=Retention(last=1))
    write(store, 1)
    ref = write(store, 2)
    for entry in [ref.folder, *ref.folder.iterdir()]:
        os.utime(entry, (1e9, 1e9))
    assert_holds(store, store.newest().ref, 2)
    write(store, 3)
    assert [ref.step for ref in store.refs()] == [3]


def test_the_last_good_one_is_never_deleted(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=Retention(last=1))
    write(store, 1)

    def damaged_on_its_way(stage: str) -> None:
        if stage == "delete old checkpoints":  # a disk that does not keep what it was given
            flip(store.folder / "step-2" / "shared.safetensors", -1)

    write(CheckpointStore(store.folder, keep=Retention(last=1), stage=damaged_on_its_way), 2)
    assert_holds(store, store.newest().ref, 1)
    write(store, 3)
    assert names(store.folder) == [POINTER, "step-3"]


def test_foreign_entries_are_left_alone(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=Retention(last=1))
    store.folder.mkdir()
    for name in ("step-x", "notes.txt", "step-99.partial.txt"):
        (store.folder / name).write_text("mine")
    (store.folder / "step-9").write_text("a file")
    write(store, 1)
    store.tidy([])
    write(store, 2)
    assert names(store.folder) == [POINTER, "notes.txt", "step-2", "step-9", "step-99.partial.txt", "step-x"]


def sign_anew(ref: CheckpointRef, change: dict[str, Any]) -> None:
    """Changes a manifest, and its hash as well."""
    file = ref.folder / MANIFEST
    manifest = json.loads(file.read_text())
    del manifest["manifest_sha256"]
    manifest |= change
    file.write_text(json.dumps(manifest | {"manifest_sha256": _digest(manifest)}))


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../etc/passwd": {"size": 1, "sha256": "0"}}},
        {"files": {"a": 1}},
        {"files": []},
        {"step": "2"},
        {"score": ["x", "y"]},
        {"score": 3},
        {"facts": None},
    ],
    ids=str,
)
def test_a_manifest_of_another_form_is_refused_even_if_its_hash_is_right(
    change: dict[str, Any], tmp_path: Path
) -> None:
    store = CheckpointStore(tmp_path / "c")
    write(store, 1)
    sign_anew(write(store, 2), change)
    assert_holds(store, store.newest().ref, 1)


def test_a_newer_version_is_no_damage(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=Retention(last=1))
    write(store, 1)
    sign_anew(write(store, 2), {"format": 99})
    with pytest.raises(
        RunFolderError, match=r"format 99; this version reads 1: use the version that wrote it"
    ):
        store.newest()
    write(store, 3)  # a version that does not know it does not delete it
    assert names(store.folder) == [POINTER, "step-2", "step-3"]


def out_of_files(*arguments: object) -> NoReturn:
    raise OSError(errno.EMFILE, "Too many open files", "tensors")


@pytest.mark.parametrize("reading", ["damage", "parse_json"])
def test_what_cannot_be_read_just_now_is_no_damage(
    reading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path / "c")
    write(store, 1)
    write(store, 2)
    with monkeypatch.context() as failing:
        failing.setattr(f"mooring.state.store.{reading}", out_of_files)
        with pytest.raises(RunFolderError, match=r"cannot read|cannot be read") as err:
            store.newest()
    assert "Too many open files" in str(err.value) and "raise the limit" in str(err.value)
    assert_holds(store, store.newest().ref, 2)
    assert names(store.folder) == [POINTER, "step-1", "step-2"]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c")
    write(store, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(RunFolderError, match=r"cannot read the checkpoints in .*Too many open files"):
            store.newest()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert_holds(store, store.newest().ref, 1)


def test_what_is_written_is_kept_also_where_later_steps_are_there(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=Retention(last=1))
    write(store, 4)
    assert_holds(store, write(store, 2), 2)
    assert names(store.folder) == [POINTER, "step-2", "step-4"]
    store.set_later_aside(store.refs()[-1])
    assert names(store.folder) == [POINTER, "step-2", "step-4.later"]
    assert_holds(store, store.newest().ref, 2)
    assert_holds(store, write(store, 4), 4)


def test_once_it_stands_nothing_makes_it_a_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path / "c", keep=Retention(last=1))
    write(store, 1)
    (store.folder / f".{POINTER}").mkdir()  # where the next pointer is written
    assert_holds(store, write(store, 2), 2)
    assert "the checkpoint is saved, but: Is a directory" in caplog.text
    assert names(store.folder) == [f".{POINTER}", POINTER, "step-2"]
    (store.folder / f".{POINTER}").rmdir()
    assert_holds(store, write(store, 3), 3)
    assert (store.folder / POINTER).read_text() == "step-3\n"


def test_what_it_counts_on_comes_first(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c")
    write(store, 1)

    def before() -> None:
        raise OSError(errno.EIO, "Input/output error", "metrics.jsonl")

    with pytest.raises(RunFolderError, match=r"Input/output error: metrics.*see to it that the file system"):
        write(store, 2, before=before)
    assert names(store.folder) == [POINTER, "step-1"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a file system of limited size needs root: mount said " + mounted.stderr.decode().strip())
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_what_was_there(small_disk: Path) -> None:
    store = CheckpointStore(small_disk / "c")
    write(store, 1)
    with pytest.raises(
        RunFolderError, match=r"No space left.*checkpoints before it are unchanged; free some"
    ) as err:
        store.write(2, "large", {"shared": encode_tree({"x": torch.ones(300_000)})})
    assert isinstance(err.value.__cause__, OSError)
    assert names(store.folder) == [POINTER, "step-1"]
    assert_holds(store, store.newest().ref, 1)
    assert_holds(store, write(store, 2), 2)


def test_a_read_only_disk_leaves_what_was_there(small_disk: Path) -> None:
    store = CheckpointStore(small_disk / "c")
    write(store, 1)
    remount = ["mount", "-o", "remount,{}", "tmpfs", str(small_disk)]
    subprocess.run([word.format("ro") for word in remount], check=True)
    with pytest.raises(RunFolderError, match=r"Read-only file system.*the right to read and write"):
        write(store, 2)
    assert_holds(store, store.newest().ref, 1)
    subprocess.run([word.format("rw") for word in remount], check=True)
    assert_holds(store, write(store, 2), 2)


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("")
    with pytest.raises(RunFolderError, match="cannot save a checkpoint"):
        write(CheckpointStore(tmp_path / "c"), 1)
    assert CheckpointStore(tmp_path / "c").newest().ref is None


def test_leftovers_of_an_unfinished_write_are_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c")
    ref = write(store, 1)
    shutil.copytree(ref.folder, store.folder / "step-5.partial")  # complete, and yet never committed
    assert_holds(store, store.newest().ref, 1)
    store.tidy([])
    assert names(store.folder) == [POINTER, "step-1"]
