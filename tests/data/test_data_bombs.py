"""Decompression bombs: refused by header and file size, by a process that could not afford to decode them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bombs import REFUSED, chunk, many_frames, png
from data_cases import encoded, picture, write

from mooring.data.images import decode_rgb, inspect
from mooring.data.manifest import Manifest
from mooring.data.quarantine import ImageProblem, Reason
from mooring.data.scan import MAX_PIXELS, scan
from mooring.errors import DataError

# 1 GiB holds Python and its libraries, and no picture of MAX_PIXELS as the bombs claim to be
_SCAN = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from mooring.data.scan import scan
report = scan(sys.argv[1], workers=1)
print(json.dumps({"kept": len(report.manifest), "left out": {row.path: row.reason.value for row in report.quarantine}}))
"""


def test_bombs_are_refused_undecoded(tmp_path: Path) -> None:
    good = {f"{c}/good{i}.jpg": encoded(picture(10 * ord(c) + i)) for c in "ab" for i in range(3)}
    write(tmp_path, good | {f"a/{name}": data for name, data in REFUSED.items()})
    sparse = tmp_path / "b" / "sparse.jpg"
    sparse.write_bytes(encoded(picture(5)))
    os.truncate(sparse, 40 << 30)  # no disk is used: the file has a hole
    done = subprocess.run(
        [sys.executable, "-c", _SCAN, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kept"] == len(good)
    assert found["left out"] == dict.fromkeys(
        [*(f"a/{name}" for name in REFUSED), "b/sparse.jpg"], Reason.TOO_LARGE.value
    )


def parquet_bomb(kind: str, file: Path) -> None:
    """A table of a few kilobytes that takes gigabytes as it stands in memory."""
    long = "a" * (1 << 26)

    def many(value: str | bytes, times: int) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([value]))

    if kind == "one long path":
        table = pa.table({"path": pa.array([long, "b.png"], pa.large_string()), "label": ["x", "y"]})
    elif kind == "one long label":
        table = pa.table({"path": ["a.png", "b.png"], "label": pa.array([long, "y"], pa.large_string())})
    elif kind == "long columns that are not read":  # and one picture
        data = [encoded(picture(1)), encoded(picture(2))]
        table = pa.table(
            {"image": data, "label": ["x", "y"], "note": pa.array([long] * 2, pa.large_string())}
        )
    elif kind == "one large picture":
        table = pa.table(
            {"image": pa.array([bytes(260 << 20), b"x"], pa.large_binary()), "label": ["x", "y"]}
        )
    elif kind == "a picture many times":  # the dictionary holds it once
        table = pa.table({"image": many(bytes(100 << 20), 8), "label": ["x"] * 8})
    elif kind == "a path many times":
        table = pa.table({"path": many("a" * 60_000, 60_000), "label": ["x"] * 60_000})
    elif kind == "many rows":
        table = pa.table({"path": many("a.png", 3_000_000), "label": many("x", 3_000_000)})
    else:
        raise AssertionError(kind)
    limit = {"dictionary_pagesize_limit": 1 << 30}
    table = table.replace_schema_metadata(None)
    pq.write_table(table, file, compression="zstd", row_group_size=1 << 20, store_schema=False, **limit)


# 3 GiB of addresses: pyarrow reserves a good part of them at once
_SCAN_TABLE = """
import resource, sys
from pathlib import Path
from mooring.data.scan import scan
from mooring.errors import MooringError
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    scan(Path(sys.argv[1]), out=Path(sys.argv[2]), workers=1)
    print("read")
except MooringError as err:
    print(err)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize(
    ("kind", "says", "megabytes"),
    [
        ("one long path", "in column 'path' of 2 rows", 50),
        ("one long label", "in column 'label' of 2 rows", 50),
        ("long columns that are not read", "a validation split cannot be made", 50),
        ("one large picture", "in column 'image' of 2 rows", 50),
        ("a picture many times", "8 not an image", 900),  # looked at a few rows at a time
        ("a path many times", "of at most 65,536 bytes in column 'path'", 150),
        ("many rows", "got 3,000,000 rows", 50),
    ],
)
def test_a_table_that_unfolds_is_refused(kind: str, says: str, megabytes: int, tmp_path: Path) -> None:
    file = tmp_path / "bomb.parquet"
    parquet_bomb(kind, file)
    assert file.stat().st_size < 200_000
    words = [sys.executable, "-c", _SCAN_TABLE, str(file), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    *told, grown = done.stdout.splitlines()
    assert says in told[0]
    assert int(grown) < megabytes


def test_a_manifest_that_unfolds_is_refused(tmp_path: Path) -> None:
    write(
        tmp_path / "photos",
        {f"{c}/{i}.png": encoded(picture(10 * ord(c) + i)) for c in "ab" for i in range(3)},
    )
    scan(tmp_path / "photos", out=tmp_path / "manifest")
    rows = tmp_path / "manifest" / "manifest.parquet"
    table = pq.read_table(rows)
    for column, value, says in (
        ("path", "a" * (1 << 26), "in column 'path'"),
        ("label", "a" * 70_000, "got one of 70,000"),
    ):
        at = table.schema.names.index(column)
        changed = table.set_column(at, table.schema.field(column), pa.array([value] * len(table)))
        pq.write_table(changed, rows, compression="zstd")
        with pytest.raises(DataError, match=says):
            Manifest.load(tmp_path / "manifest")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_many_frames_the_first_is_read(kind: str) -> None:
    image = decode_rgb(many_frames(kind, 300), MAX_PIXELS)
    assert image.size == (16, 16)
    assert max(image.getpixel((8, 8))) <= 2  # black: frame 0, as far as WebP keeps it


def test_text_that_unfolds_is_refused() -> None:
    bomb = chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(200 << 20), 9))
    with pytest.raises(ImageProblem):
        inspect(png(4, 4, bomb, data=bytes(52)), MAX_PIXELS)


def test_pixels_beyond_the_promised_size_are_not_unfolded() -> None:
    facts = inspect(png(4, 4, data=bytes(64 << 20)), MAX_PIXELS)  # 64 MiB behind a header of 4 x 4
    assert (facts.width, facts.height) == (4, 4)


def test_a_pipe_among_the_images_keeps_nobody_waiting(tmp_path: Path) -> None:
    write(tmp_path, {f"{c}/{i}.jpg": encoded(picture(10 * ord(c) + i)) for c in "ab" for i in range(3)})
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    (left_out,) = scan(tmp_path).quarantine
    assert (left_out.path, left_out.detail) == ("a/pipe.jpg", "not a regular file")
