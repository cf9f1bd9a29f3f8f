"""The manifest on disk: round trip, digest, refusal of what was changed, and the scan cache."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import encoded, picture, write, write_splits

from mooring import syncing
from mooring.data.cache import open_manifest
from mooring.data.manifest import HEAD_FILE, ROWS_FILE, SCHEMA, Manifest, load_quarantine
from mooring.data.scan import scan
from mooring.errors import DataError, RunFolderError


@pytest.fixture
def saved(folder: Path, tmp_path: Path) -> Path:
    scan(folder, out=tmp_path / "manifest")
    return tmp_path / "manifest"


def rewrite(folder: Path, column: str, row: int, value: object, *, sign: bool) -> None:
    """Changes one cell, and with ``sign`` the digest as well, as someone with intent would."""
    table = pq.read_table(folder / ROWS_FILE)
    values = table[column].to_pylist()
    values[row] = value
    place = table.schema.names.index(column)
    table = table.set_column(place, SCHEMA.field(column), pa.array(values, SCHEMA.field(column).type))
    pq.write_table(table, folder / ROWS_FILE)
    if sign:
        head = json.loads((folder / HEAD_FILE).read_text())
        head["digest"] = Manifest(Path(head["root"]), tuple(head["classes"]), table).digest
        (folder / HEAD_FILE).write_text(json.dumps(head))


def test_round_trip(folder: Path, saved: Path, manifest: Manifest) -> None:
    loaded = Manifest.load(saved)
    assert loaded.table.equals(manifest.table)
    for name in ("root", "classes", "digest", "counts", "notes", "made_validation", "source"):
        assert getattr(loaded, name) == getattr(manifest, name), name
    assert loaded.table["id"].to_pylist() == list(range(len(loaded)))
    assert load_quarantine(saved) == []


def test_the_same_manifest_is_not_written_again_and_another_takes_its_place_file_by_file(
    folder: Path, saved: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = Manifest.load(saved)
    before = {file.name: file.stat().st_ino for file in saved.iterdir()}
    scanned.save(saved)
    assert {file.name: file.stat().st_ino for file in saved.iterdir()} == before
    there: list[bool] = []
    real = syncing.replace_durably

    def looking(fresh: Path, path: Path) -> None:
        there.append(all((saved / name).is_file() for name in before))
        real(fresh, path)

    monkeypatch.setattr("mooring.data.manifest.replace_durably", looking)
    other = replace(scanned, notes=(*scanned.notes, "another note"))
    other.save(saved)
    assert there == [True]  # the head alone is another
    assert Manifest.load(saved).notes[-1] == "another note"
    assert sorted(file.name for file in saved.iterdir()) == sorted(before)


def test_the_digest_is_of_the_rows_not_of_place_and_time(folder: Path, tmp_path: Path) -> None:
    elsewhere = write_splits(tmp_path / "elsewhere")
    for file in elsewhere.rglob("*.jpg"):
        os.utime(file, ns=(1, 1))
    assert scan(elsewhere).manifest.digest == scan(folder).manifest.digest
    assert scan(elsewhere, seed=1).manifest.digest != scan(folder).manifest.digest


@pytest.mark.parametrize(
    ("column", "value"), [("class", 2), ("label", "x"), ("split", "test"), ("sha256", "0")]
)
def test_a_changed_row_is_noticed(saved: Path, column: str, value: object) -> None:
    rewrite(saved, column, 0, value, sign=False)
    with pytest.raises(DataError, match="digest"):
        Manifest.load(saved)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("class", 99), ("class", -1), ("class", None), ("label", "x"), ("split", "elsewhere"), ("id", 7), ("width", 0),
        ("height", -3), ("bytes", 0), ("path", None), ("sha256", None),
    ],
)  # fmt: skip
def test_signed_values_that_no_scan_writes_are_refused(saved: Path, column: str, value: object) -> None:
    rewrite(saved, column, 0, value, sign=True)
    with pytest.raises(DataError, match=f"impossible values in the column.*{column}"):
        Manifest.load(saved)


def test_rows_in_a_folder_of_parquet_files_are_not_taken(saved: Path) -> None:
    rows = (saved / ROWS_FILE).read_bytes()
    (saved / ROWS_FILE).unlink()
    write(saved, {f"{ROWS_FILE}/part.parquet": rows})
    with pytest.raises(DataError, match="whole manifest"):
        Manifest.load(saved)


@pytest.mark.parametrize("path", ["/etc/hostname", "../x.jpg", "train/../../x.jpg", "train/link/x.jpg", ".."])
def test_a_signed_path_that_leaves_the_root_is_refused(tmp_path: Path, path: str) -> None:
    root = write_splits(tmp_path / "root")
    scan(root, out=tmp_path / "manifest")
    write(tmp_path, {"away/x.jpg": encoded(picture(1))})
    (root / "train" / "link").symlink_to(tmp_path / "away", target_is_directory=True)
    rewrite(tmp_path / "manifest", "path", 3, path, sign=True)
    with pytest.raises(DataError, match="leads elsewhere"):
        Manifest.load(tmp_path / "manifest")


@pytest.mark.parametrize(
    ("head", "says"),
    [("{", "JSON"), ("[]", "object"), ('{"version": 99}', "version"), ('{"version": 1}', "whole manifest")],
)
def test_a_damaged_head_is_refused(saved: Path, head: str, says: str) -> None:
    (saved / HEAD_FILE).write_text(head)
    with pytest.raises(DataError, match=says):
        Manifest.load(saved)


def test_a_missing_manifest_and_a_missing_split_are_named(folder: Path, manifest: Manifest) -> None:
    with pytest.raises(DataError, match=r"manifest\.json"):
        Manifest.load(folder)
    with pytest.raises(DataError, match="'validation'"):
        manifest.split("validation")


def test_the_second_opening_decodes_nothing(folder: Path, tmp_path: Path) -> None:
    decoded: list[int] = []
    first = open_manifest(folder, tmp_path, progress=lambda done, total: decoded.append(done))
    assert decoded
    decoded.clear()
    second = open_manifest(folder, tmp_path, progress=lambda done, total: decoded.append(done))
    assert decoded == []
    assert second.digest == first.digest
    assert open_manifest(folder, tmp_path, seed=5).digest != first.digest


def test_a_manifest_folder_is_opened_as_it_is(saved: Path, tmp_path: Path) -> None:
    assert open_manifest(saved, tmp_path / "cache").digest == Manifest.load(saved).digest
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("change", ["touch", "add", "remove"])
def test_a_changed_folder_is_scanned_again(tmp_path: Path, change: str) -> None:
    root = write_splits(tmp_path / "data")
    open_manifest(root, tmp_path / "cache")
    file = root / "train" / "class_0" / "0.jpg"
    if change == "touch":
        file.write_bytes(encoded(picture(500)))
    elif change == "add":
        write(root, {"train/class_0/new.jpg": encoded(picture(501))})
    else:
        file.unlink()
    again = open_manifest(root, tmp_path / "cache")
    assert again.digest == scan(root).manifest.digest
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_damaged_cache_entry_is_made_again(folder: Path, tmp_path: Path) -> None:
    digest = open_manifest(folder, tmp_path).digest
    (entry,) = tmp_path.iterdir()
    rewrite(entry, "label", 0, "x", sign=False)
    assert open_manifest(folder, tmp_path).digest == digest


def test_several_processes_may_open_at_once(folder: Path, tmp_path: Path) -> None:
    digests: list[str] = []

    def open_it() -> None:
        digests.append(open_manifest(folder, tmp_path).digest)

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 4
    assert len(set(digests)) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_an_unwritable_cache_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cache"):
        open_manifest(folder, tmp_path / "file" / "cache")
