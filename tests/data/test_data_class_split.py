"""Classes of the run and classes kept out of it."""

from __future__ import annotations

import pytest
from test_data_subset import manifest

from mooring.data.class_split import all_splits, seen_and_unseen
from mooring.data.manifest import Manifest
from mooring.errors import DataError


def labelled(found: Manifest) -> dict[str, str]:
    """Path -> class name, through the labels of the splits."""
    rows = [found.split(name) for name in found.counts]
    return {p: found.classes[c] for split in rows for p, c in zip(split.paths, split.labels, strict=True)}


def test_the_two_parts_are_the_whole_and_share_nothing() -> None:
    whole = manifest([4, 5, 6, 7, 8])
    for unseen in (1, 2, 3):
        seen, out = seen_and_unseen(whole, unseen=unseen, seed=3)
        assert len(seen.classes) == 5 - unseen and set(seen.classes) | set(out.classes) == set(whole.classes)
        assert labelled(seen) | labelled(out) == labelled(whole)
        assert not set(labelled(seen)) & set(labelled(out))
        ids = sorted([*seen.table["id"].to_pylist(), *out.table["id"].to_pylist()])
        assert ids == whole.table["id"].to_pylist()
        assert str(5 - unseen) in seen.notes[-1] and out.classes[0] in seen.notes[-1]
        everything = all_splits(out)
        assert len(everything) == len(out)
        assert {
            p: out.classes[c] for p, c in zip(everything.paths, everything.labels, strict=True)
        } == labelled(out)


def test_named_classes_stay_in_the_order_of_the_data() -> None:
    seen, out = seen_and_unseen(manifest([2, 2, 2, 2]), classes=["c3", "c1"])
    assert seen.classes == ("c1", "c3") and out.classes == ("c0", "c2")
    assert set(seen.split("train").labels.tolist()) == {0, 1}


def test_more_unseen_classes_contain_fewer_and_seeds_differ() -> None:
    whole = manifest([2] * 12)
    chosen = [set(seen_and_unseen(whole, unseen=n, seed=1)[1].classes) for n in (2, 5, 9)]
    assert chosen[0] < chosen[1] < chosen[2]
    assert len({seen_and_unseen(whole, unseen=5, seed=s)[1].classes for s in range(6)}) > 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "one of"),
        ({"classes": ["c0", "c1"], "unseen": 1}, "one of"),
        ({"classes": ["c0", "cat"]}, "cat"),
        ({"classes": ["c0", "c1", "c2"]}, "one kept out"),
        ({"unseen": 2}, "at least two"),
    ],
)
def test_what_leaves_too_little_is_refused(options: dict, says: str) -> None:
    with pytest.raises(DataError, match=says):
        seen_and_unseen(manifest([2, 2, 2]), **options)
