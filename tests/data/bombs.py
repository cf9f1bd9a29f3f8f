"""Small files that ask for a lot: what a picture can claim, or do, to whoever decodes it."""

from __future__ import annotations

import io
import struct
import zlib

from data_cases import encoded, picture
from PIL import Image


def png(width: int, height: int, *before: bytes, data: bytes = b"\0") -> bytes:
    """A PNG that promises a size and holds almost nothing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + b"".join(before)
        + chunk(b"IDAT", zlib.compress(data, 9))
        + chunk(b"IEND", b"")
    )


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def jpeg(width: int, height: int) -> bytes:
    """A JPEG whose frame header was rewritten."""
    data = bytearray(encoded(picture(1)))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_of_scans(scans: int) -> bytes:
    """A progressive JPEG that refines the same coefficients again and again."""
    data = encoded(picture(2, 64, 64), progressive=True)
    first = data.index(b"\xff\xda")
    second = data.index(b"\xff\xda", first + 2)
    return data[:second] + data[first:second] * scans + data[second:]


def gif(width: int, height: int, screen: int = 1) -> bytes:
    """A GIF whose first frame is larger than its screen."""
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\0"
    return head + frame + b";"


def webp(width: int, height: int) -> bytes:
    """An extended WebP with a large canvas."""
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size
    body += encoded(picture(3), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def bmp(width: int, height: int) -> bytes:
    data = bytearray(encoded(picture(4), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def tiff_tile(side: int) -> bytes:
    """A TIFF of 8 x 8 pixels, cut out of one deflated tile of ``side`` x ``side``."""
    strip = zlib.compress(bytes(side * 64), 9)
    tags = [
        (256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1),
        (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 8), (325, 4, 1, len(strip)),
    ]  # fmt: skip
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + ifd


def many_frames(kind: str, frames: int) -> bytes:
    """An animation: only its first frame is anyone's business."""
    pictures = [Image.new("RGB", (16, 16), (number % 256, number // 256, 0)) for number in range(frames)]
    stream = io.BytesIO()
    pictures[0].save(stream, kind, save_all=True, append_images=pictures[1:])
    return stream.getvalue()


# name -> bytes of what must be refused by its header
REFUSED = {
    "size.png": png(50_000, 50_000),
    "size.jpg": jpeg(65_500, 65_500),
    "size.gif": gif(65_000, 65_000),
    "size.webp": webp(60_000, 60_000),
    "size.bmp": bmp(60_000, 60_000),
    "size.ppm": b"P6 70000 70000 255\n" + bytes(64),
    "plain.ppm": b"P3 70000 70000 255\n1 2 3",
    "tile.tif": tiff_tile(32_768),
    "scans.jpg": jpeg_of_scans(400),
}
