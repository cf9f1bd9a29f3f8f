"""The scan: layouts, quarantine, duplicates, the made validation split, and errors a user can act on."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_cases import SPLIT_COUNTS, encoded, odd_files, picture, write
from PIL import Image

from mooring.data.manifest import Manifest, load_quarantine
from mooring.data.quarantine import Reason
from mooring.data.scan import ScanReport, scan
from mooring.errors import DataError, MooringError, RunFolderError


def reasons(report: ScanReport) -> dict[str, Reason]:
    return {row.path: row.reason for row in report.quarantine}


def two_classes(root: Path, extra: dict[str, bytes] | None = None) -> Path:
    good = {f"{c}/{i}.jpg": encoded(picture(100 * ord(c) + i)) for c in "ab" for i in range(4)}
    return write(root, good | (extra or {}))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds almost nothing: what a decompression bomb looks like."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def test_split_folders_keep_their_test_split_and_get_a_validation_split(manifest: Manifest) -> None:
    # round(0.15 * 10) = 2 of each class's 10 train images
    assert manifest.counts == {"train": 24, "val": 6, "test": 9}
    assert manifest.classes == ("class_0", "class_1", "class_2")
    assert np.bincount(manifest.split("val").labels).tolist() == [2, 2, 2]
    assert manifest.made_validation == {"from": "train", "fraction": 0.15, "seed": 0, "images": 6}
    assert any("no validation split was given" in note for note in manifest.notes)
    for name in ("train", "val", "test"):
        split = manifest.split(name)
        for row in range(len(split)):
            with Image.open(split.file(row)) as image:
                assert image.size == tuple(split.sizes[row])
            assert split.classes[split.labels[row]] in split.paths[row]


@pytest.mark.parametrize("alias", ["val", "valid", "Validation"])
def test_a_given_validation_split_is_kept(tmp_path: Path, alias: str) -> None:
    two_classes(tmp_path / "train")
    write(tmp_path, {f"{alias}/{c}/x.jpg": encoded(picture(ord(c))) for c in "ab"})
    manifest = scan(tmp_path).manifest
    assert manifest.counts == {"train": 8, "val": 2}
    assert manifest.made_validation is None
    assert sorted(manifest.split("val").paths) == [f"{alias}/a/x.jpg", f"{alias}/b/x.jpg"]


def test_the_made_validation_split_depends_on_seed_and_bytes_only(tmp_path: Path) -> None:
    files = {f"{c}/{i}.jpg": encoded(picture(50 * ord(c) + i, 20, 20)) for c in "ab" for i in range(12)}
    write(tmp_path / "here", files)
    renamed = {path.replace(".jpg", "-copy.jpeg"): data for path, data in reversed(files.items())}
    write(tmp_path / "there", renamed)

    def chosen(root: Path, seed: int) -> set[str]:
        return set(scan(root, seed=seed).manifest.split("val").sha256)

    assert chosen(tmp_path / "here", 0) == chosen(tmp_path / "there", 0)
    assert chosen(tmp_path / "here", 0) != chosen(tmp_path / "here", 1)


@pytest.mark.parametrize("name", sorted(odd_files()))
def test_odd_pictures_are_read(odd_manifest: Manifest, name: str) -> None:
    assert any(path.endswith(f"/{name}") for path in odd_manifest.table["path"].to_pylist())


def test_sizes_are_those_of_the_upright_picture(odd_manifest: Manifest) -> None:
    sizes = {
        path.split("/")[1]: (width, height)
        for path, width, height in zip(
            *(odd_manifest.table[name].to_pylist() for name in ("path", "width", "height")), strict=True
        )
    }
    for orientation in range(1, 9):
        assert sizes[f"turned_{orientation}.jpg"] == ((61, 47) if orientation < 5 else (47, 61))
    assert sizes["turned.webp"] == sizes["turned.png"] == (47, 61)


whole = encoded(picture(1, 90, 80))
png = encoded(picture(1, 90, 80), "PNG")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("cut.jpg", whole[: len(whole) // 2], Reason.TRUNCATED),
        ("cut_in_header.jpg", whole[:40], Reason.TRUNCATED),
        ("no_end_marker.jpg", whole[:-2], Reason.TRUNCATED),
        ("cut.png", png[: len(png) // 2], Reason.TRUNCATED),
        ("cut.webp", encoded(picture(1), "WEBP")[:200], Reason.TRUNCATED),
        ("flipped.png", png[:60] + bytes(b ^ 0xFF for b in png[60:80]) + png[80:], Reason.CORRUPT),
        ("text.jpg", b"this is no picture", Reason.NOT_AN_IMAGE),
        ("notes.txt", b"also none", Reason.NOT_AN_IMAGE),
        ("empty.jpg", b"", Reason.EMPTY),
        ("large.png", encoded(picture(1, 120, 100), "PNG"), Reason.TOO_LARGE),
        ("bomb.png", png_header(50_000, 50_000), Reason.TOO_LARGE),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", Reason.UNSUPPORTED),
        ("phone.heic", b"\0\0\0\x18ftypheic" + bytes(60), Reason.UNSUPPORTED),
        ("float.tif", encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), Reason.UNSUPPORTED),
    ],
)  # fmt: skip
def test_a_bad_file_is_left_out_with_its_reason(
    tmp_path: Path, name: str, data: bytes, reason: Reason
) -> None:
    two_classes(tmp_path, {f"a/{name}": data})
    report = scan(tmp_path, max_pixels=10_000)
    assert reasons(report) == {f"a/{name}": reason}
    assert len(report.manifest) == 8


def test_links_may_not_leave_the_root(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "root")
    write(tmp_path / "elsewhere", {"secret.jpg": encoded(picture(900)), "c/d.jpg": encoded(picture(901))})
    (root / "a" / "out.jpg").symlink_to(tmp_path / "elsewhere" / "secret.jpg")
    (root / "c").symlink_to(tmp_path / "elsewhere" / "c", target_is_directory=True)
    (root / "a" / "gone.jpg").symlink_to(root / "a" / "nothing.jpg")
    (root / "a" / "loop").symlink_to(root / "a", target_is_directory=True)
    write(tmp_path / "root", {"b/target.jpg": encoded(picture(902))})
    (root / "b" / "z_inside.jpg").symlink_to("target.jpg")
    report = scan(root)
    assert reasons(report) == {
        "a/out.jpg": Reason.SYMLINK_OUTSIDE,
        "c": Reason.SYMLINK_OUTSIDE,
        "a/gone.jpg": Reason.MISSING,
        "b/z_inside.jpg": Reason.DUPLICATE,  # it was followed: its bytes are its target's
    }


def test_a_pipe_and_a_name_that_is_no_text_do_not_stop_the_scan(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "root")
    os.mkfifo(root / "a" / "pipe.jpg")
    Path(os.fsdecode(bytes(root / "a") + b"/\xff\xfe.jpg")).write_bytes(encoded(picture(5)))
    report = scan(root, out=tmp_path / "out")
    assert sorted(reasons(report).values()) == [Reason.BAD_NAME, Reason.UNREADABLE]
    assert sorted(row.reason for row in load_quarantine(tmp_path / "out")) == [
        Reason.BAD_NAME,
        Reason.UNREADABLE,
    ]


def test_of_equal_bytes_the_first_in_train_val_test_order_is_kept(tmp_path: Path) -> None:
    same = encoded(picture(777))
    two_classes(tmp_path / "train", {"a/twin1.jpg": same, "b/twin2.jpg": same})
    write(tmp_path, {"test/a/twin3.jpg": same, "test/a/own.jpg": encoded(picture(3))})
    dropped = scan(tmp_path)
    assert reasons(dropped) == {
        "train/b/twin2.jpg": Reason.DUPLICATE,
        "test/a/twin3.jpg": Reason.DUPLICATE_ACROSS,
    }
    across = scan(tmp_path, duplicates="across")
    assert reasons(across) == {"test/a/twin3.jpg": Reason.DUPLICATE_ACROSS}
    for name in ("train", "val"):  # copies that stay never lie on both sides of the made split
        paths = across.manifest.split(name).paths
        assert ("train/a/twin1.jpg" in paths) == ("train/b/twin2.jpg" in paths)


def test_an_empty_class_and_a_class_of_one_are_noted(tmp_path: Path) -> None:
    two_classes(tmp_path, {"single/only.jpg": encoded(picture(4))})
    (tmp_path / "nothing").mkdir()
    manifest = scan(tmp_path).manifest
    assert manifest.classes == ("a", "b", "single")
    assert "single/only.jpg" in manifest.split("train").paths
    assert any("'nothing'" in note for note in manifest.notes)
    assert any("'single'" in note and "no validation image" in note for note in manifest.notes)


def test_classes_are_sorted_by_code_point(tmp_path: Path) -> None:
    names = ["10", "9", "Zebra", "apple", "äpfel"]
    pictures = {f"{name}/{i}.png": picture(9 * k + i, 8, 8) for k, name in enumerate(names) for i in range(2)}
    write(tmp_path, {path: encoded(image, "PNG") for path, image in pictures.items()})
    assert scan(tmp_path).manifest.classes == tuple(sorted(names))


def test_a_class_named_train_is_a_class(tmp_path: Path) -> None:
    write(
        tmp_path,
        {f"{c}/{i}.jpg": encoded(picture(ord(c[0]) + i)) for c in ("train", "bus") for i in range(3)},
    )
    assert scan(tmp_path).manifest.classes == ("bus", "train")


def test_workers_do_not_change_the_manifest_and_progress_ends_at_the_total(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    one = scan(folder, workers=1, progress=lambda done, total: calls.append((done, total)))
    four = scan(folder, workers=4)
    assert one.manifest.digest == four.manifest.digest
    total = 3 * sum(SPLIT_COUNTS.values())
    assert calls == [(done, total) for done in range(1, total + 1)]


def no_images(root: Path) -> Path:
    (root / "a").mkdir()
    (root / "b").mkdir()
    return root


def one_class(root: Path) -> Path:
    return write(root, {f"a/{i}.jpg": encoded(picture(i)) for i in range(3)})


def loose_images(root: Path) -> Path:
    return write(root, {"x.jpg": encoded(picture(0))})


def class_only_in_test(root: Path) -> Path:
    two_classes(root / "train")
    return write(root, {"test/wolf/x.jpg": encoded(picture(1))})


def no_train(root: Path) -> Path:
    return write(root, {"test/a/x.jpg": encoded(picture(1))})


def only_singles(root: Path) -> Path:
    return write(root, {f"{c}/x.jpg": encoded(picture(ord(c))) for c in "ab"})


def plain_file(root: Path) -> Path:
    return write(root, {"photo.jpg": encoded(picture(1))}) / "photo.jpg"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (no_images, "none that can be used"),
        (one_class, "two classes"),
        (loose_images, "folder of its own"),
        (class_only_in_test, "'wolf' in test"),
        (no_train, "train"),
        (only_singles, "validation split cannot be made"),
        (plain_file, "got the file"),
        (lambda root: root / "missing", "got nothing"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_sentence(tmp_path: Path, make, says: str) -> None:
    with pytest.raises(DataError, match=says):
        scan(make(tmp_path))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_fraction_out_of_range_is_refused(folder: Path, fraction: float) -> None:
    with pytest.raises(DataError, match="between 0 and 1"):
        scan(folder, val_fraction=fraction)


def test_an_unwritable_folder_is_named_before_the_scan(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    def never(done: int, total: int) -> None:
        raise AssertionError("decoded before looking at the output folder")

    with pytest.raises(RunFolderError, match="cannot write to"):
        scan(folder, out=tmp_path / "file" / "out", progress=never)
    assert issubclass(RunFolderError, MooringError)


def test_pillows_pixel_limit_is_left_as_it_was(folder: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    scan(folder, max_pixels=10**12)
    assert before == Image.MAX_IMAGE_PIXELS is not None


@pytest.mark.assets
def test_a_real_set_with_one_known_duplicate(assets: Path) -> None:
    report = scan(assets / "datasets" / "flowers12")
    assert [row.reason for row in report.quarantine] == [Reason.DUPLICATE]
    assert "/iris/" in report.quarantine[0].path
    assert len(report.manifest.classes) == 12
    assert len(report.manifest) == 959
