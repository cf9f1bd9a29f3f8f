"""The comparisons: which images, encoder, methods and settings. What is not named here is the default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ALL = (
    "fine_tune", "linear_probe", "lp_ft", "l2_sp", "feature_map", "delta", "bss", "stoch_norm", "lwf",
    "feature_distillation", "co_tuning", "bi_tuning", "core_tuning", "dr_tune", "tes", "daft", "dr_tune+tes",
)  # fmt: skip
_LITE0 = (
    "model.name=tf_efficientnet_lite0",
    "model.weights={assets}/weights/tf_efficientnet_lite0.in1k.fp16.safetensors",
)
_VIT = (
    "model.name=vit_tiny_patch16_224",
    "model.weights={assets}/weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors",
)
_TINY = ("train.threads=1", "data.workers=1", "report.tensorboard=false", "report.plots=false")


def _pixels(size: int) -> tuple[str, str]:
    return f"train.image_size={size}", f"train.eval_size={size}"


@dataclass(frozen=True, slots=True)
class Experiment:
    """One table.

    Attributes:
        title: over the table.
        settings: of every run; ``{assets}``, ``{demo}`` and ``{work}`` are folders of the machine.
        methods: compared under these settings.
        variants: further rows under a name of their own: a method, and the settings that make it what it is.
        lrs: rates that each method chooses from, on validation data.
        shots: images per class; none: all.
        seeds: how many.
    """

    title: str
    settings: Sequence[str]
    methods: Sequence[str]
    lrs: Sequence[float]
    variants: Mapping[str, tuple[str, Sequence[str]]] = field(default_factory=dict)
    shots: Sequence[int] = ()
    seeds: int = 3


def _few_shot(images: str, encoder: Sequence[str], lrs: Sequence[float]) -> Experiment:
    model = "ViT-tiny" if encoder is _VIT else "EfficientNet-Lite0"
    return Experiment(
        title=f"`{images}`, few images a class, {model}, 96 pixels",
        settings=(
            f"data={{assets}}/datasets/{images}", *encoder, *_pixels(96), *_TINY,
            "train.epochs=8", "train.batch_size=8", "data.val_fraction=0.1",
        ),
        methods=("fine_tune", "linear_probe", "l2_sp", "co_tuning", "dr_tune", "tes", "dr_tune+tes"),
        lrs=lrs,
        shots=(2, 5),
    )  # fmt: skip


EXPERIMENTS: Mapping[str, Experiment] = {
    "fruit": Experiment(
        title="Fruit in a supermarket, all 675 training photos, EfficientNet-Lite0, 96 pixels",
        settings=("data={demo}/groceries.parquet", *_LITE0, *_pixels(96), *_TINY, "train.epochs=3"),
        methods=ALL,
        lrs=(3e-4, 1e-3),
    ),
    "fruit_5_shots": Experiment(
        title="Fruit in a supermarket, 5 photos a class, EfficientNet-Lite0, 96 pixels",
        settings=(
            "data={demo}/groceries.parquet", *_LITE0, *_pixels(96), *_TINY,
            "train.epochs=8", "train.batch_size=14",
        ),
        methods=ALL,
        lrs=(3e-4, 1e-3),
        shots=(5,),
    ),
    "flowers12_vit": _few_shot("flowers12", _VIT, (1e-4, 3e-4)),
    "flowers12_lite0": _few_shot("flowers12", _LITE0, (3e-4, 1e-3)),
    "tf_flowers5_vit": _few_shot("tf_flowers5", _VIT, (1e-4, 3e-4)),
    "tf_flowers5_lite0": _few_shot("tf_flowers5", _LITE0, (3e-4, 1e-3)),
    "pacs6": Experiment(
        title="`pacs6`: trained on photos, tested on photos, art, cartoons and sketches, EfficientNet-Lite0",
        settings=(
            "data={assets}/datasets/pacs6/photo", *_LITE0, *_pixels(96), *_TINY, "train.epochs=3",
            "data.extra_test.art={assets}/datasets/pacs6/art_painting",
            "data.extra_test.cartoon={assets}/datasets/pacs6/cartoon",
            "data.extra_test.sketch={assets}/datasets/pacs6/sketch",
            "method.text={assets}/text/minilm_class_embeddings.npz:pacs6",
            "report.distortion=true",
        ),
        methods=("fine_tune", "linear_probe", "lp_ft", "daft", "dr_tune", "tes", "daft+dr_tune+tes"),
        lrs=(1e-4, 3e-4, 1e-3),
    ),
}  # fmt: skip
