"""One file's bytes -> an upright 8-bit RGB picture: the rule every source follows.

The rule: first frame; EXIF orientation applied; 16-bit grey divided by 257; transparency laid over
white; CMYK, palette, grey and bilevel converted by Pillow; colour profiles ignored. Pictures that
other decoders are known to read to the same pixels are marked ``native``; a source with a decoder of
its own gives those to it and sends the rest through ``decode_rgb``.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from mooring.data.decoding_cost import check_canvas, check_header
from mooring.data.quarantine import ImageProblem, Reason

# Pillow knows some forty formats; each parser that is not needed is one less to attack.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HIGH_BIT_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
_PIL_LIMIT = threading.Lock()

# leading bytes -> (format, does this project read it)
_SIGNATURES: tuple[tuple[bytes, str, bool], ...] = (
    (b"\xff\xd8\xff", "JPEG", True),
    (b"\x89PNG\r\n\x1a\n", "PNG", True),
    (b"GIF87a", "GIF", True),
    (b"GIF89a", "GIF", True),
    (b"II*\x00", "TIFF", True),
    (b"MM\x00*", "TIFF", True),
    (b"II+\x00", "TIFF", True),
    (b"MM\x00+", "TIFF", True),
    *((b"P%d" % kind, "PPM", True) for kind in range(1, 7)),
    (b"BM", "BMP", True),
    (b"8BPS", "Photoshop", False),
    (b"\x00\x00\x01\x00", "ICO", False),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000", False),
    (b"\xff\x4f\xff\x51", "JPEG 2000", False),
    (b"\xff\x0a", "JPEG XL", False),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL", False),
    (b"%PDF", "PDF", False),
    (b"%!PS", "PostScript", False),
    (b"<svg", "SVG", False),
)
_EXTENSIONS = {
    "JPEG": "jpg",
    "PNG": "png",
    "GIF": "gif",
    "TIFF": "tif",
    "BMP": "bmp",
    "WEBP": "webp",
    "PPM": "ppm",
}


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the scan learns by decoding.

    Attributes:
        width, height: pixels, upright (after EXIF orientation).
        format, mode: Pillow's names, as stored in the file.
        native: other decoders give the same pixels, orientation included.
    """

    width: int
    height: int
    format: str
    mode: str
    native: bool


def signature(data: bytes) -> tuple[str, bool] | None:
    """Format named by the leading bytes and whether it is supported; None where they name none."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP", True
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "AVIF or HEIF", False
    for lead, name, supported in _SIGNATURES:
        if data.startswith(lead):
            return name, supported
    return None


def check_signature(head: bytes) -> None:
    """Refuses what the leading bytes show to be no supported image, so that nothing else of it need be read.

    Args:
        head: at least the first 32 bytes of a file, or all of it.

    Raises:
        ImageProblem: empty, not an image, or an unsupported format.
    """
    if not head:
        raise ImageProblem(Reason.EMPTY, "0 bytes")
    found = signature(head)
    if found is None:
        raise ImageProblem(Reason.NOT_AN_IMAGE, f"starts with {head[:8]!r}")
    if not found[1]:
        raise ImageProblem(Reason.UNSUPPORTED, f"{found[0]}; convert it to JPEG or PNG")


def extension(data: bytes) -> str:
    """File extension for the bytes, without the dot; ``bin`` where the leading bytes name no format."""
    found = signature(data)
    return _EXTENSIONS.get(found[0], found[0].lower()) if found is not None and found[1] else "bin"


def inspect(data: bytes, max_pixels: int) -> ImageFacts:
    """Decodes once and says what was found.

    Args:
        data: the whole file.
        max_pixels: limit on width x height, checked on the header, before anything is decoded.

    Raises:
        ImageProblem: the image cannot be used.
    """
    image = _open(data, max_pixels)
    stored_format, stored_mode = image.format or "", image.mode
    upright = _upright_rgb(image, data)
    name = "JPEG" if stored_format == "MPO" else stored_format
    return ImageFacts(
        upright.width, upright.height, name, stored_mode, _is_native(data, image, name, stored_mode)
    )


def decode_rgb(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """The upright 8-bit RGB picture of a file.

    Args:
        data: the whole file.
        max_pixels: as for ``inspect``; None: no limit, for bytes that were inspected before.

    Raises:
        ImageProblem: the image cannot be used.
    """
    return _upright_rgb(_open(data, max_pixels), data)


def encode_ppm(image: Image.Image) -> bytes:
    """The picture as uncompressed PPM: how pixels decoded here reach another decoder unchanged."""
    return b"P6\n%d %d\n255\n" % image.size + image.tobytes()


@contextmanager
def _no_pillow_limit() -> Iterator[None]:
    # Pillow's own pixel limit is process-wide and fixed; ours is per call and stands right behind.
    with _PIL_LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _open(data: bytes, max_pixels: int | None) -> Image.Image:
    check_signature(data)
    if max_pixels is not None:
        check_canvas(data, max_pixels)
    try:
        with _no_pillow_limit():
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise _damaged(data, OSError("unreadable header")) from None
    except Exception as err:  # Pillow's parsers raise whatever the damage led to
        raise _damaged(data, err) from None
    if max_pixels is not None:
        check_header(image, data, max_pixels)
    return image


def _upright_rgb(image: Image.Image, data: bytes) -> Image.Image:
    try:
        image.load()
        upright = _UPRIGHT.get(_orientation(image))
        return _to_rgb(image if upright is None else image.transpose(upright))
    except ImageProblem:
        raise
    except MemoryError:
        raise
    except Exception as err:  # as above
        raise _damaged(data, err) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode in _HIGH_BIT_GREY:
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        raise ImageProblem(Reason.UNSUPPORTED, f"pixels of type {mode} (32-bit) have no agreed range")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as err:
        raise ImageProblem(Reason.UNSUPPORTED, f"colour mode {mode}: {err}") from None


def _is_native(data: bytes, image: Image.Image, name: str, mode: str) -> bool:
    if mode not in ("L", "RGB"):
        return False
    if name == "JPEG":
        # Pillow also takes an orientation from XMP and shrugs at damaged tags; other decoders take it from
        # EXIF, and who knows what they make of damage
        return image.info.get("adobe_transform") != 0 and _exif_orientation(image) == _orientation(image)
    if name == "PNG":
        bit_depth, colour_type = data[24], data[25]
        animated = getattr(image, "is_animated", False)
        plain = bit_depth == 8 and colour_type in (0, 2) and "transparency" not in image.info
        return plain and not animated and _exif_orientation(image) == _orientation(image) == 1
    return False


def _orientation(image: Image.Image) -> int:
    """1 to 8; damaged tags are no reason to lose a picture, and count as 1."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # as in _open
        return 1


def _exif_orientation(image: Image.Image) -> int | None:
    """What the EXIF block alone says; None where it is damaged."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        return int(exif.get(_ORIENTATION, 1))
    except Exception:  # as in _open
        return None


def _damaged(data: bytes, err: Exception) -> ImageProblem:
    found = signature(data)
    text = str(err) or type(err).__name__
    cut = (
        "truncated" in text
        or isinstance(err, EOFError)
        or (found is not None and _is_cut_short(data, found[0]))
    )
    return ImageProblem(Reason.TRUNCATED if cut else Reason.CORRUPT, text)


def _is_cut_short(data: bytes, name: str) -> bool:
    if name == "JPEG":
        return b"\xff\xd9" not in data[-1024:]
    if name == "PNG":
        return b"IEND" not in data[-1024:]
    if name == "GIF":
        return not data.rstrip(b"\x00").endswith(b"\x3b")
    if name == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if name == "BMP":
        return len(data) < int.from_bytes(data[2:6], "little")
    return False
