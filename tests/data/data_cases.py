"""Generated pictures for the data tests: smooth photos-like images and every odd file the scan must face."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

SPLIT_COUNTS = {"train": 10, "test": 3}


def picture(number: int, width: int = 61, height: int = 47) -> Image.Image:
    """A smooth colour picture with edges and a little noise; another number is another picture."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width]
    waves = [
        np.sin(rng.uniform(0.05, 0.3) * x + rng.uniform(0.05, 0.3) * y + rng.uniform(0, 6)) for _ in "rgb"
    ]
    pixels = 127 + 90 * np.stack(waves, axis=2) + rng.normal(0, 4, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 255, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The picture as file bytes."""
    stream = io.BytesIO()
    image.save(stream, kind, **({"quality": 92} | options if kind == "JPEG" else options))
    return stream.getvalue()


def oriented(image: Image.Image, orientation: int, kind: str = "JPEG", **options: object) -> bytes:
    """The picture with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif, **options)


def write(root: Path, files: dict[str, bytes]) -> Path:
    """Writes path -> bytes below a folder."""
    for path, data in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return root


def write_splits(root: Path, classes: int = 3) -> Path:
    """``train|test/class/image`` of mixed sizes."""
    files, number = {}, 0
    for split, count in SPLIT_COUNTS.items():
        for c in range(classes):
            for i in range(count):
                number += 1
                image = picture(number, 40 + 7 * (number % 5), 36 + 11 * (number % 3))
                files[f"{split}/class_{c}/{i}.jpg"] = encoded(image)
    return write(root, files)


def odd_files() -> dict[str, bytes]:
    """File name -> bytes of pictures that must be read, each of another kind."""
    base = picture(1)
    rgba = base.convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(base.size))
    deep = np.linspace(0, 65535, base.width * base.height).reshape(base.height, base.width).astype(np.uint16)
    palette = picture(2).convert("P", palette=Image.Palette.ADAPTIVE)
    frames = [picture(n).convert("P") for n in (20, 21)]
    return {
        "rgb.jpg": encoded(picture(3)),
        "progressive.jpeg": encoded(picture(4), progressive=True, subsampling=2),
        "UPPER.JPG": encoded(picture(5)),
        "with space.jpg": encoded(picture(6)),
        "ünï-花.jpg": encoded(picture(7)),
        "grey.jpg": encoded(picture(8).convert("L")),
        "cmyk.jpg": encoded(picture(9).convert("CMYK")),
        "rgb.png": encoded(picture(10), "PNG"),
        "grey.png": encoded(picture(11).convert("L"), "PNG"),
        "bilevel.png": encoded(picture(12).convert("1"), "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "palette_transparent.png": encoded(palette, "PNG", transparency=3),
        "alpha.png": encoded(rgba, "PNG"),
        "grey_alpha.png": encoded(picture(13).convert("LA"), "PNG"),
        "deep.png": encoded(Image.fromarray(deep), "PNG"),
        "deep.tif": encoded(Image.fromarray(deep[::-1].copy()), "TIFF"),
        "cmyk.tif": encoded(picture(14).convert("CMYK"), "TIFF"),
        "lzw.tiff": encoded(picture(15), "TIFF", compression="tiff_lzw"),
        "lossy.webp": encoded(picture(16), "WEBP", quality=80),
        "alpha.webp": encoded(rgba, "WEBP", lossless=True),
        "turned.webp": oriented(picture(18), 6, "WEBP"),
        "turned.png": oriented(picture(19), 8, "PNG"),
        "plain.bmp": encoded(picture(17), "BMP"),
        "still.gif": encoded(palette, "GIF"),
        "moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "portable.ppm": encoded(picture(22), "PPM"),
        "damaged_exif.jpg": encoded(picture(26), exif=b"Exif\0\0" + bytes(8)),
        "damaged_exif.webp": encoded(picture(27), "WEBP", exif=b"Exif\0\0" + bytes(8)),
        "really_a_png.jpg": encoded(picture(23), "PNG"),
        "one_pixel.png": encoded(picture(24, 1, 1), "PNG"),
        "thin.jpg": encoded(picture(25, 200, 3)),
        **{f"turned_{o}.jpg": oriented(picture(30 + o), o) for o in range(1, 9)},
    }
