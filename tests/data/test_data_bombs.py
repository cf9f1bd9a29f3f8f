"""Decompression bombs: refused by header and file size, by a process that could not afford to decode them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from bombs import REFUSED, chunk, many_frames, png
from data_cases import encoded, picture, write

from mooring.data.images import decode_rgb, inspect
from mooring.data.quarantine import ImageProblem, Reason
from mooring.data.scan import MAX_PIXELS, scan

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
