"""What is done to a picture before the model sees it, as data: every source carries out the same description.

The order is fixed: crop and resize to a square, affine warp, tone curve (posterise, solarise), gain and
offset (brightness, contrast), chroma matrix (saturation, hue), erase, flip, normalise. Each stage works on
8-bit pixels and rounds once. RandAugment operations that fall into one stage are fused there, which fixes
their order but lets every source run them as one operation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mooring.errors import DataError

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
PresetName = Literal["light", "standard", "strong"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Operations whose parameters can be drawn without looking at the picture; those that depend on its
# content (equalise, autocontrast) would tie the draw to one decoder's pixels.
RAND_AUGMENT_OPS = (
    "identity",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "posterise",
    "solarise",
)


@dataclass(frozen=True, slots=True)
class ModelInput:
    """What a pretrained model expects.

    Attributes:
        size: pixels of the square input.
        mean, std: per channel, of pixels in [0, 1].
        interpolation: of the resize.
        crop_pct: side of the centre crop over the shorter side, at test time, in (0, 1].
    """

    size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 0.875

    @classmethod
    def from_model_config(cls, config: Mapping[str, Any], *, size: int | None = None) -> ModelInput:
        """Reads timm's data config (``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``).

        Args:
            config: as ``timm.data.resolve_model_data_config`` returns it.
            size: another resolution than the model's own.

        Raises:
            DataError: the model does not take three channels.
        """
        channels, height, width = config.get("input_size", (3, 224, 224))
        mean, std = tuple(config.get("mean", IMAGENET_MEAN)), tuple(config.get("std", IMAGENET_STD))
        if channels != 3 or len(mean) != 3 or len(std) != 3:
            raise DataError(f"expected a model for 3-channel images; got one for {channels} channels")
        interpolation = config.get("interpolation", "bicubic")
        return cls(
            size=size if size is not None else min(height, width),
            mean=(float(mean[0]), float(mean[1]), float(mean[2])),
            std=(float(std[0]), float(std[1]), float(std[2])),
            interpolation=interpolation if interpolation in _INTERPOLATIONS else "bilinear",
            crop_pct=min(1.0, float(config.get("crop_pct") or 1.0)),
        )


_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True, slots=True)
class CentreCrop:
    """The middle square with ``fraction`` of the shorter side; what test time uses."""

    fraction: float


@dataclass(frozen=True, slots=True)
class RandomCrop:
    """A square with ``fraction`` of the shorter side, anywhere."""

    fraction: float


@dataclass(frozen=True, slots=True)
class RandomResizedCrop:
    """A rectangle with a share of the area in ``scale`` and width over height in ``ratio`` (log-uniform)."""

    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass(frozen=True, slots=True)
class ColourJitter:
    """Factors uniform in [1 - x, 1 + x]; hue in degrees, uniform in [-x, x].

    Contrast turns about mid-grey (127.5), not about the picture's own mean. Saturation and hue need a
    3 x 3 matrix per pixel, which costs several times what brightness and contrast cost.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0


@dataclass(frozen=True, slots=True)
class RandAugment:
    """``count`` operations per picture, drawn with replacement from ``RAND_AUGMENT_OPS``.

    ``magnitude`` in [0, 1] is the share of the full range: 30 degrees, shear 0.3, translation 0.45 of the
    side, factors 1 +- 0.9, hue 90 degrees, 4 bits, solarise all. Signs are drawn.
    """

    count: int = 2
    magnitude: float = 0.3


@dataclass(frozen=True, slots=True)
class RandomErasing:
    """With ``probability``, a rectangle with a share of the area in ``scale`` takes the mean colour."""

    probability: float = 0.25
    scale: tuple[float, float] = (0.02, 0.2)
    ratio: tuple[float, float] = (0.3, 3.3)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """One complete description, from the upright picture to the normalised tensor.

    Attributes:
        input: size, normalisation and interpolation of the model.
        crop: which part of the picture is used.
        flip: probability of a horizontal mirror.
        jitter, rand_augment, erasing: None leaves the stage out.
    """

    input: ModelInput
    crop: CentreCrop | RandomCrop | RandomResizedCrop
    flip: float = 0.0
    jitter: ColourJitter | None = None
    rand_augment: RandAugment | None = None
    erasing: RandomErasing | None = None

    @property
    def mean_pixel(self) -> tuple[int, int, int]:
        """The normalisation mean as an 8-bit colour: what warps and erasing fill with."""
        red, green, blue = (round(255 * value) for value in self.input.mean)
        return red, green, blue

    def to_json(self) -> dict[str, Any]:
        """A JSON tree that ``from_json`` reads back to an equal description."""
        tree = asdict(self)
        tree["crop"]["kind"] = type(self.crop).__name__
        return json.loads(json.dumps(tree))

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Augmentation:
        """Reads what ``to_json`` wrote."""
        crop = dict(tree["crop"])
        kind = _CROPS[crop.pop("kind")]
        jitter, rand_augment, erasing = tree["jitter"], tree["rand_augment"], tree["erasing"]
        return cls(
            input=ModelInput(**_tuples(tree["input"])),
            crop=kind(**_tuples(crop)),
            flip=tree["flip"],
            jitter=None if jitter is None else ColourJitter(**jitter),
            rand_augment=None if rand_augment is None else RandAugment(**rand_augment),
            erasing=None if erasing is None else RandomErasing(**_tuples(erasing)),
        )

    @property
    def fingerprint(self) -> str:
        """sha256 of the description; part of a loader's saved state."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


_CROPS: dict[str, type[CentreCrop] | type[RandomCrop] | type[RandomResizedCrop]] = {
    "CentreCrop": CentreCrop,
    "RandomCrop": RandomCrop,
    "RandomResizedCrop": RandomResizedCrop,
}


def preset(name: PresetName, model: ModelInput) -> Augmentation:
    """Training augmentation by name.

    ``light``: random crop of the test-time size, flip. ``standard``: random resized crop that keeps at
    least 40 % of the area (pretrained features survive that better than ImageNet's 8 %), flip, mild
    brightness and contrast. ``strong``: the same with 25 %, more colour, RandAugment and erasing.

    Raises:
        DataError: no preset has that name.
    """
    if name == "light":
        return Augmentation(model, RandomCrop(model.crop_pct), flip=0.5)
    if name == "standard":
        jitter = ColourJitter(brightness=0.2, contrast=0.2)
        return Augmentation(model, RandomResizedCrop((0.4, 1.0)), flip=0.5, jitter=jitter)
    if name == "strong":
        return Augmentation(
            model,
            RandomResizedCrop((0.25, 1.0)),
            flip=0.5,
            jitter=ColourJitter(brightness=0.3, contrast=0.3),
            rand_augment=RandAugment(),
            erasing=RandomErasing(),
        )
    raise DataError(f"expected an augmentation preset light, standard or strong; got {name!r}")


def mild(model: ModelInput) -> Augmentation:
    """Random resized crop that keeps at least half of the area, and flip: the second pair of views of
    Concept-Tuning, whose patches must still show what the peak of the map points at."""
    return Augmentation(model, RandomResizedCrop((0.5, 1.0)), flip=0.5)


def evaluation(model: ModelInput) -> Augmentation:
    """Resize and centre crop, nothing random: validation, test and prediction."""
    return Augmentation(model, CentreCrop(model.crop_pct))


def _tuples(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}
