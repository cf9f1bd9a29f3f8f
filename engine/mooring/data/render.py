"""The reference for pixels: one picture and its draws -> the normalised array, with Pillow and NumPy."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mooring.data.augment import Augmentation
from mooring.data.draws import Draws

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def render(image: Image.Image, augment: Augmentation, draws: Draws, i: int) -> np.ndarray:
    """Carries out the description with the i-th draws.

    Args:
        image: upright RGB picture.

    Returns:
        [S, S, 3] float32, normalised.
    """
    side = augment.input.size
    top, left, bottom, right = (float(edge) for edge in draws.window[i])
    resampling = RESAMPLING[augment.input.interpolation]
    image = image.resize((side, side), resampling, box=(left, top, right, bottom))
    if draws.warps[i]:
        image = image.transform(
            (side, side),
            Image.Transform.AFFINE,
            tuple(draws.warp[i].ravel().tolist()),
            Image.Resampling.BILINEAR,
            fillcolor=augment.mean_pixel,
        )
    curve = tone_curve(draws, i)
    if curve is not None:
        image = image.point(3 * curve)
    if draws.chromas[i]:
        rows = np.concatenate([draws.chroma[i], np.zeros((3, 1), np.float32)], axis=1)
        image = image.convert("RGB", tuple(rows.ravel().tolist()))
    pixels = np.asarray(image)
    top, left, height, width = (int(edge) for edge in draws.erase[i])
    if height:
        pixels = pixels.copy()
        pixels[top : top + height, left : left + width] = augment.mean_pixel
    if draws.flip[i]:
        pixels = pixels[:, ::-1]
    return normalise(pixels, augment)


def tone_curve(draws: Draws, i: int) -> list[int] | None:
    """The 256 output values of posterise, solarise, gain and offset; None where they change nothing."""
    gain, offset = draws.gain[i], draws.offset[i]
    if draws.keep_bits[i] == 255 and draws.solarise[i] == 256 and gain == 1 and offset == 0:
        return None
    levels = np.arange(256) & int(draws.keep_bits[i])
    levels = np.where(levels >= draws.solarise[i], 255 - levels, levels)
    return np.clip(np.rint(gain * levels.astype(np.float32) + offset), 0, 255).astype(int).tolist()


def normalise(pixels: np.ndarray, augment: Augmentation) -> np.ndarray:
    """``(x - 255 mean) / (255 std)`` per channel, float32."""
    mean, scale = normalisation(augment)
    out = pixels.astype(np.float32)
    out -= mean
    out *= scale
    return out


def normalisation(augment: Augmentation) -> tuple[np.ndarray, np.ndarray]:
    """Mean and reciprocal standard deviation per channel in 8-bit units, [3] float32 each."""
    mean = 255.0 * np.asarray(augment.input.mean)
    scale = 1.0 / (255.0 * np.asarray(augment.input.std))
    return mean.astype(np.float32), scale.astype(np.float32)
