"""CSV, TSV and Parquet lists, and Parquet that carries the images."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import encoded, picture, write

from mooring.data.manifest import Manifest
from mooring.data.quarantine import Reason
from mooring.data.scan import scan
from mooring.errors import DataError

LABELS = ("ant", "bee")


def write_pictures(root: Path, count: int = 8) -> list[str]:
    paths = [f"pictures/{'deep er/' if i % 2 else ''}{i}.jpg" for i in range(count)]
    write(root, {path: encoded(picture(i)) for i, path in enumerate(paths)})
    return paths


def write_list(file: Path, columns: dict[str, list]) -> Path:
    if file.suffix == ".parquet":
        pq.write_table(pa.table(columns), file)
        return file
    with file.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.writer(stream, delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("with_split", [False, True])
def test_a_list_names_path_label_and_split(tmp_path: Path, suffix: str, with_split: bool) -> None:
    paths = write_pictures(tmp_path)
    labels = [LABELS[i // 2 % 2] for i in range(8)]
    columns: dict[str, list] = {"path": paths, "label": labels}
    if with_split:
        columns["split"] = ["train"] * 4 + ["valid"] * 2 + ["TEST"] * 2
    manifest = scan(write_list(tmp_path / f"list{suffix}", columns)).manifest
    assert manifest.classes == LABELS
    assert manifest.counts == ({"train": 4, "val": 2, "test": 2} if with_split else {"train": 6, "val": 2})
    rows = dict(zip(manifest.table["path"].to_pylist(), manifest.table["label"].to_pylist(), strict=True))
    assert rows == dict(zip(paths, labels, strict=True))


def test_explicit_column_names_and_integer_labels(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path)
    columns = {"where": paths, "what": [i % 2 for i in range(8)], "label": ["ignored"] * 8}
    file = write_list(tmp_path / "list.parquet", columns)
    manifest = scan(file, image_column="where", label_column="what").manifest
    assert manifest.classes == ("0", "1")


def test_rows_that_cannot_be_used_are_listed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    paths = write_pictures(root)
    write(tmp_path, {"outside.jpg": encoded(picture(99))})
    (root / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (root / "linked").symlink_to(tmp_path, target_is_directory=True)
    bad = {
        "../outside.jpg": Reason.OUTSIDE_ROOT,
        str(tmp_path / "outside.jpg"): Reason.OUTSIDE_ROOT,
        "link.jpg": Reason.SYMLINK_OUTSIDE,
        "linked/outside.jpg": Reason.SYMLINK_OUTSIDE,
        "pictures/none.jpg": Reason.MISSING,
        "pictures": Reason.UNREADABLE,
        "pictures/0.jpg": Reason.BAD_LABEL,
    }
    columns = {
        "path": [*paths[1:], str(root / paths[0]), *bad],
        "label": [*(LABELS[i % 2] for i in range(8)), *(["ant"] * 6), "  "],
    }
    report = scan(write_list(root / "list.csv", columns))
    assert {row.path: row.reason for row in report.quarantine} == bad
    assert len(report.manifest) == 8  # the absolute path below the root is fine


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty file"),
        ("file_path_of,label\na,b\n", "column with the path"),
        ("path,kind\na,b\n", "column with the label"),
        ("path,label\na,b,c\n", "2 fields in line 2"),
        ("path,label,split\na,b,train\nc,d,later\n", r"column 'split' of .*list.csv; got 'later' in row 2"),
        ("file_path_of,label\na,b\n", r"--image-column \(scan\) or data.image_column= \(train\)"),
        ("path,kind\na,b\n", r"--label-column \(scan\) or data.label_column= \(train\)"),
        ("path,label\n", "none that can be used"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        scan(tmp_path / "list.csv")


@pytest.mark.parametrize("data", [b"", b"no parquet at all"])
def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(DataError, match="Parquet"):
        scan(tmp_path / "x.parquet")


def demo_like(file: Path) -> list[bytes]:
    """Several labels repeat the same bytes, as in the demo's data; one row is no picture."""
    images = [encoded(picture(i), "PNG" if i % 3 == 0 else "JPEG") for i in range(10)]
    images[9] = b"no picture"
    columns = {
        "dataset": ["train"] * 6 + ["val"] * 2 + ["test"] * 2,
        "coarse_cat": ["fruit"] * 10,
        "finegrained_cat": [LABELS[i % 2] for i in range(10)],
        "image_data": images,
    }
    table = pa.table(columns)
    again = table.slice(2, 3).set_column(1, "coarse_cat", pa.array(["other"] * 3))
    pq.write_table(pa.concat_tables([table, again]), file)
    return images


def test_image_bytes_become_files_below_the_manifest(tmp_path: Path) -> None:
    images = demo_like(tmp_path / "images.parquet")
    report = scan(tmp_path / "images.parquet", out=tmp_path / "manifest")
    assert report.reasons == {"duplicate": 3, "not an image": 1}
    assert report.manifest.counts == {"train": 6, "val": 2, "test": 1}
    assert "images.parquet#row9" in [row.path for row in report.quarantine]
    stored = {file.read_bytes() for file in (tmp_path / "manifest" / "images").iterdir()}
    assert stored == set(images[:9])
    paths, digests = (report.manifest.table[name].to_pylist() for name in ("path", "sha256"))
    for row, sha256 in zip(paths, digests, strict=True):
        assert Path(row).stem == sha256[:32]
        assert hashlib.sha256((tmp_path / "manifest" / row).read_bytes()).hexdigest() == sha256


def test_extracted_images_move_with_their_manifest(tmp_path: Path) -> None:
    demo_like(tmp_path / "images.parquet")
    before = scan(tmp_path / "images.parquet", out=tmp_path / "one").manifest
    (tmp_path / "one").rename(tmp_path / "two")
    after = Manifest.load(tmp_path / "two")
    assert after.digest == before.digest
    assert after.split("train").file(0).is_file()


def test_image_bytes_need_a_place(tmp_path: Path) -> None:
    demo_like(tmp_path / "images.parquet")
    with pytest.raises(DataError, match="out="):
        scan(tmp_path / "images.parquet")


def test_hugging_face_parquet_has_struct_images_and_class_names(tmp_path: Path) -> None:
    images = [{"bytes": encoded(picture(i)), "path": f"{i}.jpg"} for i in range(6)]
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table({"image": images, "label": [0, 1] * 3})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "hf.parquet")
    manifest = scan(tmp_path / "hf.parquet", out=tmp_path / "out").manifest
    assert manifest.classes == ("cat", "dog")
    assert len(manifest) == 6


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_delimiter_is_the_one_of_the_header(tmp_path: Path, suffix: str, delimiter: str) -> None:
    paths = write_pictures(tmp_path)
    names = ["one, or; more", "an\tother"]  # quoted: each delimiter is also part of a label
    with (tmp_path / f"list{suffix}").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(("path", "label"))
        writer.writerows((path, names[i % 2]) for i, path in enumerate(paths))
    manifest = scan(tmp_path / f"list{suffix}").manifest
    assert manifest.classes == tuple(sorted(names))
    assert len(manifest) == len(paths)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("column", ["dataset", "fold"])
@pytest.mark.parametrize(
    ("values", "counts"),
    [
        (["train"] * 4 + ["val"] * 2 + ["test"] * 2, {"train": 4, "val": 2, "test": 2}),
        (["train"] * 7 + ["cifar"], {"train": 6, "val": 2}),
        (["0", "1", "2", "3"] * 2, {"train": 6, "val": 2}),
    ],
    ids=["splits", "one other", "numbers"],
)
def test_an_ambiguous_column_is_the_split_only_if_all_its_values_are_splits(
    tmp_path: Path, suffix: str, column: str, values: list[str], counts: dict[str, int]
) -> None:
    labels = [LABELS[i // 2 % 2] for i in range(8)]
    columns = {"path": write_pictures(tmp_path), "label": labels, column: values}
    file = write_list(tmp_path / f"list{suffix}", columns)
    assert scan(file).manifest.counts == counts


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_split_column_given_by_name_must_hold_splits(tmp_path: Path, suffix: str) -> None:
    columns = {"path": write_pictures(tmp_path), "label": list(LABELS) * 4, "fold": ["train"] * 7 + ["cifar"]}
    file = write_list(tmp_path / f"list{suffix}", columns)
    with pytest.raises(DataError, match=r"column 'fold' .* got 'cifar' in row 8.*--split-column"):
        scan(file, split_column="fold")


def test_image_bytes_beside_another_kind_of_dataset_column(tmp_path: Path) -> None:
    columns = {
        "dataset": ["flowers"] * 6,
        "label": [LABELS[i % 2] for i in range(6)],
        "image": [encoded(picture(i)) for i in range(6)],
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert scan(tmp_path / "x.parquet", out=tmp_path / "out").manifest.counts == {"train": 4, "val": 2}
    with pytest.raises(DataError, match=r"column 'dataset' of .* got 'flowers' in row 1"):
        scan(tmp_path / "x.parquet", out=tmp_path / "two", split_column="dataset")
    assert not (tmp_path / "two").exists()
