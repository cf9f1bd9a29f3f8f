"""Parts of the training images: exact counts, the same classes, nested, and nothing else touched."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooring.data.manifest import SCHEMA, Manifest
from mooring.data.subset import training_subset
from mooring.errors import DataError


def manifest(counts: list[int], order: int = 1) -> Manifest:
    """``counts[c]`` train images of class c, two val and one test image each."""
    rows = []
    for c, count in enumerate(counts):
        for split, n in (("train", count), ("val", 2), ("test", 1)):
            for i in range(n):
                rows.append((f"{split}/{c}/{i}", c, split))
    rows = sorted(rows, key=lambda row: ("train", "val", "test").index(row[2]))[::order]
    columns = {
        "id": list(range(len(rows))), "path": [path for path, _, _ in rows], "label": [f"c{c}" for _, c, _ in rows],
        "class": [c for _, c, _ in rows], "split": [split for _, _, split in rows],
        "width": [8] * len(rows), "height": [8] * len(rows), "bytes": [9] * len(rows),
        "sha256": [f"digest of {path}" for path, _, _ in rows],
        "format": ["PNG"] * len(rows), "mode": ["RGB"] * len(rows), "native": [True] * len(rows),
        "mtime_ns": [0] * len(rows),
    }  # fmt: skip
    return Manifest(Path("/photos"), tuple(f"c{c}" for c in range(len(counts))), pa.table(columns, SCHEMA))


def test_a_part_is_saved_and_read_with_the_ids_of_the_whole(tmp_path: Path) -> None:
    part = training_subset(manifest([4, 5]), shots=1)
    part.save(tmp_path / "part")
    assert Manifest.load(tmp_path / "part").table.equals(part.table)


def paths(found: Manifest, split: str = "train") -> set[str]:
    return set(found.split(split).paths)


@given(
    counts=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    shots=st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_shots_are_exact_nested_and_leave_the_rest_alone(counts: list[int], shots: int, seed: int) -> None:
    whole = manifest(counts)
    part = training_subset(whole, shots=shots, seed=seed)
    assert Counter(part.split("train").labels.tolist()) == {c: min(n, shots) for c, n in enumerate(counts)}
    assert paths(part) <= paths(training_subset(whole, shots=shots + 1, seed=seed))
    ids = dict(zip(whole.table["id"].to_pylist(), whole.table["path"].to_pylist(), strict=True))
    assert all(
        ids[i] == path
        for i, path in zip(part.table["id"].to_pylist(), part.table["path"].to_pylist(), strict=True)
    )
    for split in ("val", "test"):
        assert part.split(split).ids.tolist() == whole.split(split).ids.tolist()
    assert part.classes == whole.classes
    # the order of the files decides nothing
    assert paths(training_subset(manifest(counts, order=-1), shots=shots, seed=seed)) == paths(part)


@pytest.mark.parametrize(
    ("fraction", "kept"), [(0.25, [3, 1, 1]), (0.5, [5, 2, 1]), (0.55, [6, 2, 1]), (1.0, [10, 3, 1])]
)
def test_a_fraction_is_taken_of_each_class(fraction: float, kept: list[int]) -> None:
    """2.5 rounds up, and a class never disappears."""
    part = training_subset(manifest([10, 3, 1]), fraction=fraction)
    assert Counter(part.split("train").labels.tolist()) == dict(enumerate(kept))


def test_another_seed_draws_other_images_and_the_notes_say_what_was_done() -> None:
    whole = manifest([20, 20, 3])
    drawn = {frozenset(paths(training_subset(whole, shots=5, seed=seed))) for seed in range(5)}
    assert len(drawn) == 5
    notes = training_subset(whole, shots=5, seed=1).notes
    assert notes == (
        "training uses 13 of 43 training images: 5 per class, drawn with seed 1",
        "1 of 3 classes have fewer than 5 training images and give all: c2",
    )


@pytest.mark.parametrize("wrong", [{}, {"shots": 1, "fraction": 0.5}, {"shots": 0}, {"fraction": 1.5}])
def test_a_wrong_part_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(DataError, match="expected"):
        training_subset(manifest([2, 2]), **wrong)  # type: ignore[arg-type]
