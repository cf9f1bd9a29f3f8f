"""Data that is only measured on: no train split, one class or few, labels in the run's order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from data_cases import encoded, picture, write, write_splits

from mooring.data.cache import open_manifest
from mooring.data.manifest import Manifest
from mooring.data.scan import scan
from mooring.errors import DataError

RUN_CLASSES = ["zebra", "ant", "bee"]  # of a run: the order is the run's, whatever it is
Opened = Callable[..., Manifest]


@pytest.fixture(params=["scan", "open_manifest"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    if request.param == "scan":
        return lambda path: scan(path, for_evaluation=True, classes=RUN_CLASSES).manifest
    cache = tmp_path_factory.mktemp("cache")
    return lambda path: open_manifest(path, cache, for_evaluation=True, classes=RUN_CLASSES)


def labelled(root: Path, *names: str, per_class: int = 2) -> Path:
    files = {f"{n}/{i}.jpg": encoded(picture(sum(n.encode()) + i)) for n in names for i in range(per_class)}
    return write(root, files)


def rows(manifest: Manifest) -> set[tuple[str, int, str]]:
    columns = (manifest.table[name].to_pylist() for name in ("label", "class", "split"))
    return set(zip(*columns, strict=True))


def test_class_folders_are_one_test_split(tmp_path: Path, opened: Opened) -> None:
    manifest = opened(labelled(tmp_path, "ant", "zebra"))
    assert manifest.classes == tuple(RUN_CLASSES)
    assert manifest.counts == {"test": 4}
    assert manifest.made_validation is None
    assert rows(manifest) == {("zebra", 0, "test"), ("ant", 1, "test")}
    assert any("'bee'" in note for note in manifest.notes)


def test_one_class_with_one_image_is_enough(tmp_path: Path, opened: Opened) -> None:
    manifest = opened(labelled(tmp_path, "bee", per_class=1))
    assert rows(manifest) == {("bee", 2, "test")}
    assert manifest.split("test").labels.tolist() == [2]


@pytest.mark.parametrize("splits", [("test",), ("val", "test"), ("train",), ("train", "val")])
def test_given_splits_keep_their_names(tmp_path: Path, opened: Opened, splits: tuple[str, ...]) -> None:
    for place, split in enumerate(splits):
        pictures = {f"{split}/ant/{i}.jpg": encoded(picture(10 * place + i)) for i in range(3)}
        write(tmp_path, pictures)
    manifest = opened(tmp_path)
    assert manifest.counts == dict.fromkeys(splits, 3)
    assert {label for label, _, _ in rows(manifest)} == {"ant"}


@pytest.mark.parametrize("with_split", [False, True])
def test_a_list_too(tmp_path: Path, opened: Opened, with_split: bool) -> None:
    labelled(tmp_path, "ant")
    lines = [f"ant/{i}.jpg,ant{',val' if with_split else ''}" for i in range(2)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label" + (",split" if with_split else ""), *lines]))
    assert opened(tmp_path / "list.csv").counts == {"val" if with_split else "test": 2}


def test_labels_unknown_to_the_run_are_named(tmp_path: Path, opened: Opened) -> None:
    with pytest.raises(DataError, match=r"got 'wasp', 'wolf': rename"):
        opened(labelled(tmp_path, "ant", "wolf", "wasp"))


def test_a_saved_scan_is_mapped_onto_the_runs_classes(tmp_path: Path) -> None:
    classes = ["class_2", "other", "class_0", "class_1"]
    saved = scan(write_splits(tmp_path / "data"), out=tmp_path / "scan").manifest
    manifest = open_manifest(tmp_path / "scan", tmp_path / "cache", for_evaluation=True, classes=classes)
    assert manifest.counts == saved.counts
    assert {(label, place) for label, place, _ in rows(manifest)} == {
        ("class_2", 0),
        ("class_0", 2),
        ("class_1", 3),
    }
    with pytest.raises(DataError, match="'class_0', 'class_1'"):
        open_manifest(tmp_path / "scan", tmp_path / "cache", for_evaluation=True, classes=["class_2"])


def test_without_a_class_list_the_labels_found_are_the_classes(tmp_path: Path) -> None:
    manifest = scan(labelled(tmp_path, "zebra", "ant"), for_evaluation=True).manifest
    assert manifest.classes == ("ant", "zebra")
    assert manifest.counts == {"test": 4}


def test_another_class_order_is_another_cache_entry(tmp_path: Path) -> None:
    data, cache = labelled(tmp_path / "data", "ant", "bee"), tmp_path / "cache"
    for classes in (["ant", "bee"], ["bee", "ant"]):
        manifest = open_manifest(data, cache, for_evaluation=True, classes=classes)
        assert manifest.classes == tuple(classes)
    assert open_manifest(data, cache).counts == {"train": 2, "val": 2}
