"""What decoding a picture may cost, found in its size and header: a bomb is refused before it is decoded."""

from __future__ import annotations

from PIL import Image

from mooring.data.quarantine import ImageProblem, Reason

_BYTES_A_PIXEL = 8  # four channels of 16 bits, uncompressed
_BYTES_BESIDE = 64 << 20  # previews, colour profiles, further frames
# A progressive JPEG is decoded once more, over all its pixels, for each of its scans; encoders write about ten.
_MOST_SCANS = 100
# of TIFF: a tile is decoded as a whole, however small the picture that is cut out of it
_MOST_TILE_PIXELS = 1 << 26
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags


def check_file_size(size: int, max_pixels: int) -> None:
    """Refuses a file that is larger than any picture of ``max_pixels`` can be, before it is read.

    Raises:
        ImageProblem: it is.
    """
    limit = _BYTES_A_PIXEL * max_pixels + _BYTES_BESIDE
    if size > limit:
        raise ImageProblem(Reason.TOO_LARGE, f"{size} bytes, more than {max_pixels} pixels can take")


def check_canvas(data: bytes, max_pixels: int) -> None:
    """Refuses a WebP by the canvas it names: its decoder makes room for two of them when it opens the file.

    Args:
        data: at least the first 30 bytes of a file of any format.

    Raises:
        ImageProblem: more than ``max_pixels``.
    """
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        _check_pixels(width, height, max_pixels)


def check_header(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Refuses a picture whose header asks for more than ``max_pixels`` in any way.

    Args:
        image: opened, not decoded.
        data: the whole file.

    Raises:
        ImageProblem: it does.
    """
    width, height = image.size
    if width * height > max_pixels:
        raise ImageProblem(Reason.TOO_LARGE, f"{width} x {height} pixels, the limit is {max_pixels} pixels")
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        tile = [_whole(tags.get(tag)) for tag in (_TILE_WIDTH, _TILE_LENGTH)]
        if tile[0] * tile[1] > _MOST_TILE_PIXELS:
            raise ImageProblem(
                Reason.TOO_LARGE,
                f"tiles of {tile[0]} x {tile[1]} pixels, the limit is {_MOST_TILE_PIXELS} pixels",
            )
    if image.format in ("JPEG", "MPO"):
        scans = data.count(b"\xff\xda")  # the start of a scan; inside one, a byte ff is followed by 00
        if scans > _MOST_SCANS:
            raise ImageProblem(Reason.TOO_LARGE, f"{scans} scans to decode, the limit is {_MOST_SCANS}")


def _check_pixels(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise ImageProblem(Reason.TOO_LARGE, f"{width} x {height} pixels, the limit is {limit} pixels")


def _whole(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
