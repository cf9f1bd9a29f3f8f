"""Settings of DAFT."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mooring.config.settings import Settings


class DAFTSettings(Settings):
    """DAFT (AAAI 2024, arXiv 2308.07728): BatchNorm conversion, then head and encoder together at rates far apart.

    ``optimizer.lr`` is the encoder's rate. Published with SGD: 3e-6 to 1e-4 for MoCo and CLIP starts, 3e-3 to 0.3
    for SwAV, head 0.1 to 10; where nothing is known, begin at 3e-5 (MoCo, CLIP) or a hundredth of the head's rate
    (supervised, SwAV) and choose on validation data.
    """

    name: Literal["daft"] = "daft"
    conversion: bool = Field(
        default=True,
        description="give BatchNorm the statistics of the new images, with weights that keep the function",
    )
    zero_head: bool = Field(
        default=True, description="start the head at zero, so that the encoder moves only as the head learns"
    )
    head_lr: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        default="auto",
        description="the head's peak rate itself, no multiple; auto: with sgd the largest that is surely stable on "
        "these features, times 0.4, else as none; none: as optimizer.head_lr_multiplier says",
    )
    calib_transform: Literal["train", "clean"] = Field(
        default="train",
        description="images of the conversion: augmented as in training (public code), or as in the test",
    )
    calib_images: int | None = Field(
        default=None, ge=1, description="how many training images it looks at; none: all; 4096 are enough"
    )
