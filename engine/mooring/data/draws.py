"""The random numbers of each picture, drawn once and handed to every source as explicit parameters.

A picture's numbers come from a counter-based generator keyed by (seed, epoch, manifest id, view). So they do
not depend on the order, the loader, the worker or the rank that asks, and any batch can be made again without
replaying the ones before it. Only the generator's raw 64-bit words are used: NumPy keeps those the
same across versions, its distributions it may change.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import numpy as np

from mooring.data.augment import (
    RAND_AUGMENT_OPS,
    Augmentation,
    CentreCrop,
    ColourJitter,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomResizedCrop,
)

_CROP_TRIES = 10
# fixed places in a picture's sequence of uniforms: switching one stage off leaves the others as they were
_CROP = slice(0, 2 * _CROP_TRIES)
_PLACE = slice(20, 22)
_FLIP = 22
_JITTER = slice(23, 27)
_ERASE = slice(27, 32)
_OPS = 32
_PER_OP = 2

_ORDER_STREAM, _PIXEL_STREAM = 0x0D0E, 0x0F1C
_WORD = 2**64 - 1
# BT.601 luma, and YIQ for hue: the inverse is computed, so that hue 0 is exactly the identity
_LUMA = np.array([0.299, 0.587, 0.114])
_TO_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
_MID_GREY = 127.5


@dataclass(frozen=True, slots=True)
class Draws:
    """Explicit parameters of B pictures.

    Attributes:
        window: [B, 4] float32, (top, left, bottom, right) in pixels of the upright picture.
        warp: [B, 2, 3] float32, output to input coordinates (x, y), pixel corners at integers.
        warps: [B] bool, whether ``warp`` does anything.
        keep_bits: [B] uint8, mask of the bits that posterising keeps.
        solarise: [B] int16, values from here on are inverted; 256 is off.
        gain, offset: [B] float32, ``gain * x + offset`` in 8-bit units.
        chroma: [B, 3, 3] float32, applied to (r, g, b).
        chromas: [B] bool, whether ``chroma`` does anything.
        erase: [B, 4] int64, (top, left, height, width) after the resize; height 0 is off.
        flip: [B] bool, mirror left to right.
    """

    window: np.ndarray
    warp: np.ndarray
    warps: np.ndarray
    keep_bits: np.ndarray
    solarise: np.ndarray
    gain: np.ndarray
    offset: np.ndarray
    chroma: np.ndarray
    chromas: np.ndarray
    erase: np.ndarray
    flip: np.ndarray


@dataclass(slots=True)
class _One:
    """Parameters of one picture while they are put together."""

    warp: np.ndarray
    keep_bits: int = 255
    solarise: int = 256
    gain: float = 1.0
    offset: float = 0.0
    chroma: np.ndarray | None = None
    warps: bool = False


def words(seed: int, stream: int, epoch: int, item: int, view: int, count: int) -> np.ndarray:
    """``count`` raw 64-bit words of the stream of (seed, stream, epoch, item, view)."""
    # The lowest counter word numbers the blocks inside a stream, the three above name the stream. Key and
    # counter are Python integers, not arrays: no cast lies between a seed and its stream.
    key = _joined(seed, stream)
    return np.random.Philox(key=key, counter=_joined(0, view, item, epoch)).random_raw(count)


def _joined(*parts: int) -> int:
    """One integer of 64-bit words, the lowest first; a part that is not a whole number is a TypeError."""
    return sum((operator.index(part) & _WORD) << (64 * place) for place, part in enumerate(parts))


def uniforms(seed: int, epoch: int, item: int, view: int, count: int) -> np.ndarray:
    """``count`` float64 in [0, 1)."""
    return (words(seed, _PIXEL_STREAM, epoch, item, view, count) >> np.uint64(11)) * 2.0**-53


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of ``range(count)``, int64."""
    keys = words(seed, _ORDER_STREAM, epoch, 0, 0, count)
    return np.argsort(keys, kind="stable").astype(np.int64)


def draw(
    augment: Augmentation, sizes: np.ndarray, ids: np.ndarray, *, seed: int, epoch: int, view: int = 0
) -> Draws:
    """Draws the parameters of B pictures.

    Args:
        augment: what to draw for.
        sizes: [B, 2] upright (width, height) in pixels.
        ids: [B] manifest ids; a padding row (-1) gets parameters too, of a picture nobody looks at.
        seed, epoch, view: with the id, the key of a picture's numbers.
    """
    count = len(ids)
    side = augment.input.size
    operations = augment.rand_augment.count if augment.rand_augment is not None else 0
    out = Draws(
        window=np.zeros((count, 4), np.float32),
        warp=np.tile(np.eye(2, 3, dtype=np.float32), (count, 1, 1)),
        warps=np.zeros(count, bool),
        keep_bits=np.full(count, 255, np.uint8),
        solarise=np.full(count, 256, np.int16),
        gain=np.ones(count, np.float32),
        offset=np.zeros(count, np.float32),
        chroma=np.tile(np.eye(3, dtype=np.float32), (count, 1, 1)),
        chromas=np.zeros(count, bool),
        erase=np.zeros((count, 4), np.int64),
        flip=np.zeros(count, bool),
    )
    for i in range(count):
        u = uniforms(seed, epoch, int(ids[i]), view, _OPS + _PER_OP * operations)
        out.window[i] = _window(augment.crop, int(sizes[i, 0]), int(sizes[i, 1]), u[_CROP], u[_PLACE])
        out.flip[i] = u[_FLIP] < augment.flip
        one = _One(warp=np.eye(3))
        if augment.rand_augment is not None:
            _rand_augment(one, augment.rand_augment, side, u[_OPS:])
        if augment.jitter is not None:
            _jitter(one, augment.jitter, u[_JITTER])
        if augment.erasing is not None:
            out.erase[i] = _erase(augment.erasing, side, u[_ERASE])
        out.warp[i], out.warps[i] = one.warp[:2], one.warps
        out.keep_bits[i], out.solarise[i] = one.keep_bits, one.solarise
        out.gain[i], out.offset[i] = one.gain, one.offset
        if one.chroma is not None:
            out.chroma[i], out.chromas[i] = one.chroma, True
    return out


def _window(
    crop: CentreCrop | RandomCrop | RandomResizedCrop,
    width: int,
    height: int,
    tries: np.ndarray,
    place: np.ndarray,
) -> tuple[float, float, float, float]:
    if isinstance(crop, RandomResizedCrop):
        crop_width, crop_height, inside = _resized(crop, width, height, tries)
        if not inside:  # torchvision's fallback: the middle, as much of it as the ratio allows
            place = np.array([0.5, 0.5])
        left = float(math.floor(place[0] * (width - crop_width + 1)))
        top = float(math.floor(place[1] * (height - crop_height + 1)))
        left, top = min(left, width - crop_width), min(top, height - crop_height)
        return top, left, top + crop_height, left + crop_width
    # at least one pixel, and in source pixels, not rounded: resize and crop are one step
    side = max(1.0, crop.fraction * min(width, height))
    at_x, at_y = place if isinstance(crop, RandomCrop) else (0.5, 0.5)
    top, left = at_y * (height - side), at_x * (width - side)
    return top, left, top + side, left + side


def _resized(crop: RandomResizedCrop, width: int, height: int, tries: np.ndarray) -> tuple[int, int, bool]:
    low, high = crop.scale
    log_low, log_high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    for for_area, for_ratio in tries.reshape(-1, 2):
        area = (low + (high - low) * for_area) * width * height
        ratio = math.exp(log_low + (log_high - log_low) * for_ratio)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return crop_width, crop_height, True
    ratio = min(max(width / height, crop.ratio[0]), crop.ratio[1])
    return max(1, min(width, round(height * ratio))), max(1, min(height, round(width / ratio))), False


def _jitter(one: _One, jitter: ColourJitter, u: np.ndarray) -> None:
    brightness, contrast, saturation, hue = 2.0 * u - 1.0
    _gain(one, 1.0 + jitter.brightness * brightness, 0.0)
    _contrast(one, 1.0 + jitter.contrast * contrast)
    if jitter.saturation:
        _saturation(one, 1.0 + jitter.saturation * saturation)
    if jitter.hue:
        _hue(one, jitter.hue * hue)


def _rand_augment(one: _One, settings: RandAugment, side: int, u: np.ndarray) -> None:
    strength = settings.magnitude
    for choice, sign in u.reshape(-1, _PER_OP):
        name = RAND_AUGMENT_OPS[int(choice * len(RAND_AUGMENT_OPS))]
        signed = strength if sign < 0.5 else -strength
        if name == "rotate":
            angle = math.radians(30.0 * signed)
            cos, sin = math.cos(angle), math.sin(angle)
            _warp(one, [[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]], side)
        elif name == "shear_x":
            _warp(one, [[1.0, 0.3 * signed, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], side)
        elif name == "shear_y":
            _warp(one, [[1.0, 0.0, 0.0], [0.3 * signed, 1.0, 0.0], [0.0, 0.0, 1.0]], side)
        elif name == "translate_x":
            _warp(one, [[1.0, 0.0, 0.45 * signed * side], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], side)
        elif name == "translate_y":
            _warp(one, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.45 * signed * side], [0.0, 0.0, 1.0]], side)
        elif name == "brightness":
            _gain(one, 1.0 + 0.9 * signed, 0.0)
        elif name == "contrast":
            _contrast(one, 1.0 + 0.9 * signed)
        elif name == "saturation":
            _saturation(one, 1.0 + 0.9 * signed)
        elif name == "hue":
            _hue(one, 90.0 * signed)
        elif name == "posterise":
            one.keep_bits &= (0xFF << round(4.0 * strength)) & 0xFF
        elif name == "solarise":
            one.solarise = min(one.solarise, round(256.0 * (1.0 - strength)))


def _warp(one: _One, about_centre: list[list[float]], side: int) -> None:
    centre = side / 2.0
    there, back = np.eye(3), np.eye(3)
    there[:2, 2], back[:2, 2] = -centre, centre
    one.warp = one.warp @ (back @ np.array(about_centre) @ there)
    one.warps = True


def _gain(one: _One, gain: float, offset: float) -> None:
    one.gain, one.offset = gain * one.gain, gain * one.offset + offset


def _contrast(one: _One, factor: float) -> None:
    _gain(one, factor, _MID_GREY * (1.0 - factor))


def _saturation(one: _One, factor: float) -> None:
    _chroma(one, factor * np.eye(3) + (1.0 - factor) * np.tile(_LUMA, (3, 1)))


def _hue(one: _One, degrees: float) -> None:
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    _chroma(one, _FROM_YIQ @ np.array([[1.0, 0.0, 0.0], [0.0, cos, sin], [0.0, -sin, cos]]) @ _TO_YIQ)


def _chroma(one: _One, matrix: np.ndarray) -> None:
    one.chroma = matrix if one.chroma is None else matrix @ one.chroma


def _erase(erasing: RandomErasing, side: int, u: np.ndarray) -> tuple[int, int, int, int]:
    if u[0] >= erasing.probability:
        return 0, 0, 0, 0
    area = (erasing.scale[0] + (erasing.scale[1] - erasing.scale[0]) * u[1]) * side * side
    log_low, log_high = math.log(erasing.ratio[0]), math.log(erasing.ratio[1])
    ratio = math.exp(log_low + (log_high - log_low) * u[2])
    height = min(side, max(1, round(math.sqrt(area * ratio))))
    width = min(side, max(1, round(math.sqrt(area / ratio))))
    return int(u[3] * (side - height + 1)), int(u[4] * (side - width + 1)), height, width
