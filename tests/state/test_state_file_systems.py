"""One run folder on several file systems: who keeps which, what is whole, and what travels before it is read."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))

from ranks import RankPool, rank_pool

APART = ["a", "b"]


@pytest.fixture(scope="module")
def two() -> Iterator[RankPool]:
    sys.path.insert(0, str(Path(__file__).parent))
    with rank_pool(2) as pool:
        yield pool


def case(two: RankPool, name: str, root: Path, disks: list[str] = APART, **more: object) -> list:  # type: ignore[type-arg]
    return two.run(f"file_systems_cases:{name}", root=root, disks=disks, **more)


def test_ranks_find_out_which_folder_they_share(two: RankPool, tmp_path: Path) -> None:
    assert case(two, "seen", tmp_path, ["a", "a"]) == [(0, 0)] * 2
    assert case(two, "seen", tmp_path) == [(0, 1)] * 2
    assert not list((tmp_path / "a" / "run").iterdir())


def test_a_folder_that_one_rank_cannot_write_is_refused_by_both(two: RankPool, tmp_path: Path) -> None:
    (tmp_path / "b").write_text("a file")
    first, second = case(two, "refused", tmp_path)
    assert (
        "rank 1 stopped: RunFolderError: out: expected a folder that can be written on every machine" in first
    )
    assert "Not a directory" in second


@pytest.mark.parametrize(
    ("again", "every"),
    [
        pytest.param(["a", "b"], False, id="same-machines"),
        pytest.param(["b", "a"], False, id="machines-swapped"),
        pytest.param(["a", "b"], True, id="all-parts"),
    ],
)
def test_each_keeps_its_own_and_gets_what_it_lacks(
    two: RankPool, tmp_path: Path, again: list[str], every: bool
) -> None:
    case(two, "write", tmp_path, steps=[1, 2, 3])
    assert {file.name for file in (tmp_path / "b" / "run" / "c" / "step-3").iterdir()} == {
        "manifest.json", "rank-1.json", "rank-1.safetensors",
    }  # fmt: skip
    manifests = [(tmp_path / disk / "run" / "c" / "step-3" / "manifest.json").read_bytes() for disk in "ab"]
    assert manifests[0] == manifests[1]
    for rank, found in enumerate(case(two, "read", tmp_path, again, every=every)):
        assert (found["step"], found["weights"], found["own"]) == (3, 3.0, 3 + 0.25 * rank)
        assert found["notes"] == [] and found["names"] == ["step-2", "step-3"]
        if every:
            assert len(found["files"]) == 7


def test_what_stands_on_one_file_system_only_is_passed_over(two: RankPool, tmp_path: Path) -> None:
    """As where a machine dies between the two renames."""
    case(two, "write", tmp_path, steps=[1, 2])
    newest = tmp_path / "b" / "run" / "c" / "step-2"
    newest.rename(newest.with_name("step-2.partial"))
    for found in case(two, "read", tmp_path):
        assert found["step"] == 1
        assert (
            "step-2 cannot be used: rank-1.json, rank-1.safetensors: on the file system of no rank"
            in found["notes"][0]
        )
    assert sorted(entry.name for entry in (tmp_path / "a" / "run" / "c").glob("step*")) == [
        "step-1",
        "step-2.damaged",
    ]
    assert sorted(entry.name for entry in newest.parent.glob("step*")) == ["step-1"]
    case(two, "write", tmp_path, steps=[2])
    assert [found["step"] for found in case(two, "read", tmp_path)] == [2, 2]


def test_damage_on_either_counts(two: RankPool, tmp_path: Path) -> None:
    case(two, "write", tmp_path, steps=[1, 2])
    file = tmp_path / "b" / "run" / "c" / "step-2" / "rank-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert [found["step"] for found in case(two, "read", tmp_path)] == [1, 1]


def test_states_of_one_name_and_two_runs_are_not_mixed(two: RankPool, tmp_path: Path) -> None:
    case(two, "write", tmp_path, steps=[1, 2])
    case(two, "write", tmp_path / "other", steps=[2], reason="another run")
    theirs, ours = (root / "b" / "run" / "c" / "step-2" for root in (tmp_path / "other", tmp_path))
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    for found in case(two, "read", tmp_path):
        assert found["step"] == 1
        assert "the file systems of the ranks have different checkpoints of this name" in found["notes"][0]


def test_a_machine_with_an_empty_disk_cannot_bring_a_part_back(two: RankPool, tmp_path: Path) -> None:
    case(two, "write", tmp_path, steps=[1])
    shutil.rmtree(tmp_path / "b")
    for found in case(two, "read", tmp_path):
        assert found["step"] is None
        assert "rank-1.json, rank-1.safetensors: on the file system of no rank" in found["notes"][0]
