"""What a scan refuses before it decodes, what it skips, and what it leaves behind."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from data_cases import encoded, picture, write, write_splits

from mooring.config.load import load_config
from mooring.data.cache import open_manifest
from mooring.data.manifest import Manifest
from mooring.data.scan import scan
from mooring.errors import ConfigError, DataError, RunFolderError


def class_folders(root: Path, classes: str = "ab", count: int = 4) -> Path:
    names = {f"{c}/{i}.jpg": encoded(picture(100 * ord(c) + i)) for c in classes for i in range(count)}
    return write(root, names)


def never(done: int, total: int) -> None:
    raise AssertionError("decoded before the arguments were looked at")


@pytest.mark.parametrize("text", ["", " ", "\t\n"])
def test_an_empty_path_is_not_the_working_directory(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="empty text"):
        scan(text)
    with pytest.raises(DataError, match="empty text"):
        open_manifest(text, tmp_path)


@pytest.mark.parametrize("override", ["data=", "data=' '", "data.path="])
def test_an_empty_data_setting_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="empty text"):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"val_fraction": 0.0}, "between 0 and 1"),
        ({"val_fraction": 1.5}, "between 0 and 1"),
        ({"val_fraction": float("nan")}, "between 0 and 1"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"classes": ["a"]}, "class list"),
    ],
)
def test_arguments_are_checked_before_anything_is_decoded(folder: Path, tmp_path: Path, arguments, says: str):
    with pytest.raises(DataError, match=says):
        scan(folder, out=tmp_path / "out", progress=never, **arguments)
    assert not (tmp_path / "out").exists()


def test_the_folder_that_holds_the_classes_is_named(tmp_path: Path) -> None:
    right = class_folders(tmp_path / "nested" / "photos" / "2024")
    for high in ("nested", "nested/photos"):
        with pytest.raises(DataError) as refusal:
            scan(tmp_path / high)
        assert f"{right}/<class>" in str(refusal.value)
        assert str(refusal.value).endswith(f"give data={right}")
    assert scan(right).manifest.classes == ("a", "b")


def test_the_folder_that_holds_the_splits_is_named(tmp_path: Path) -> None:
    right = write_splits(tmp_path / "nested" / "photos")
    with pytest.raises(DataError, match=rf"<split>/<class>: give data={right}$"):
        scan(tmp_path / "nested")


def test_mostly_deeper_images_are_refused_and_a_few_are_noted(tmp_path: Path) -> None:
    class_folders(tmp_path)
    write(tmp_path, {"a/more/x.jpg": encoded(picture(1))})
    assert any("deeper" in note for note in scan(tmp_path).notes)
    files = {f"{c}/day{i}/x.jpg": encoded(picture(7 * ord(c) + i)) for c in "ab" for i in range(9)}
    write(tmp_path, files)
    with pytest.raises(DataError, match="19 of 27 images deeper"):
        scan(tmp_path)


def test_a_class_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_folders(tmp_path, "abc")
    scandir = os.scandir

    def refusing(path):  # root may list any folder, so the refusal is made here
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=f"class folder {tmp_path / 'b'}: Permission denied"):
        scan(tmp_path)


def test_a_failed_scan_leaves_no_folder_behind(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "source", "a")
    with pytest.raises(DataError, match="two classes"):
        scan(source, out=tmp_path / "new" / "deep" / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="two classes"):
        scan(source, out=tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_out_may_not_lie_among_the_images(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "root")
    for out in (root, root / "scan", root / "a" / "scan"):
        with pytest.raises(RunFolderError, match="outside the images"):
            scan(root, out=out, progress=never)
    assert not (root / "scan").exists()
    scan(root, out=root / ".cache" / "scan")  # hidden: never listed


@pytest.mark.parametrize(
    "marks", [("manifest.json", "manifest.parquet"), ("config.toml", "metrics.jsonl")], ids=["scan", "run"]
)
@pytest.mark.parametrize("place", ["written", "a/written"])
def test_what_mooring_wrote_is_not_read_as_images(tmp_path: Path, marks: tuple[str, str], place: str) -> None:
    class_folders(tmp_path)
    write(tmp_path, {f"{place}/plots/x.png": encoded(picture(9), "PNG")})
    write(tmp_path, dict.fromkeys((f"{place}/{mark}" for mark in marks), b""))
    report = scan(tmp_path)
    assert report.manifest.classes == ("a", "b")
    assert (len(report.manifest), report.quarantine) == (8, ())
    assert any(place in note and "mooring" in note for note in report.notes)


def test_out_is_overwritten_by_the_same_source_only(tmp_path: Path) -> None:
    one, other = class_folders(tmp_path / "one"), class_folders(tmp_path / "other", "cd")
    first = scan(one, out=tmp_path / "out").manifest
    with pytest.raises(RunFolderError, match=f"holds the scan of {one}: choose another out"):
        scan(other, out=tmp_path / "out", progress=never)
    assert Manifest.load(tmp_path / "out").digest == first.digest
    again = scan(one, out=tmp_path / "out", seed=3).manifest
    assert Manifest.load(tmp_path / "out").digest == again.digest != first.digest


def test_a_scan_is_not_scanned(folder: Path, tmp_path: Path) -> None:
    scan(folder, out=tmp_path / "out")
    with pytest.raises(DataError, match=f"already a scan: train with data={tmp_path / 'out'}"):
        scan(tmp_path / "out")


def test_the_quarantine_goes_where_the_manifest_goes(tmp_path: Path) -> None:
    root = write(class_folders(tmp_path / "root"), {"a/bad.jpg": b"none", "b/empty.jpg": b""})
    report = scan(root)
    assert len(report.quarantine) == 2
    report.manifest.save(tmp_path / "first")
    opened = open_manifest(tmp_path / "first", tmp_path / "cache")
    opened.save(tmp_path / "second")
    assert Manifest.load(tmp_path / "second").quarantine == report.quarantine
    assert (tmp_path / "first/quarantine.csv").read_bytes() == (
        tmp_path / "second/quarantine.csv"
    ).read_bytes()
    assert json.loads((tmp_path / "second/manifest.json").read_text())["quarantined"] == 2
    assert open_manifest(root, tmp_path / "cache").quarantine == report.quarantine


def test_a_damaged_quarantine_list_is_refused(tmp_path: Path) -> None:
    scan(write(class_folders(tmp_path / "root"), {"a/bad.jpg": b"none"}), out=tmp_path / "out")
    file = tmp_path / "out" / "quarantine.csv"
    file.write_text(file.read_text().replace("not an image", "no reason"))
    with pytest.raises(DataError, match="whole manifest"):
        Manifest.load(tmp_path / "out")
