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


def _schedules(source: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Soft Fine-tuning with images of ``source``, under each of three schedules; zero is plain fine-tuning."""
    images = f"method.source_data={source}", f"method.source_classes={source}/classes.tsv"
    return {
        f"soft_fine_tuning, {schedule}": ("soft_fine_tuning", (f"method.soft_schedule={schedule}", *images))
        for schedule in ("zero", "linear", "constant")
    }


_CONCEPT = {"concept_tuning": ("concept_tuning", ("method.predict=auto", "method.patches=4"))}
_SOFT = {
    "soft_fine_tuning": (
        "soft_fine_tuning",
        (
            "method.source_data={assets}/datasets/tiny_imagenet200",
            "method.source_classes={assets}/datasets/tiny_imagenet200/classes.tsv",
        ),
    )
}

EXPERIMENTS: Mapping[str, Experiment] = {
    "fruit": Experiment(
        title="Fruit in a supermarket, all 675 training photos, EfficientNet-Lite0, 96 pixels",
        settings=("data={demo}/groceries.parquet", *_LITE0, *_pixels(96), *_TINY, "train.epochs=3"),
        methods=ALL,
        lrs=(3e-4, 1e-3),
    ),
    "fruit_concept": Experiment(
        title="Fruit, all 675 training photos, at the rate that Concept-Tuning chose in `fine_grained`",
        settings=(
            "data={demo}/groceries.parquet", *_LITE0, *_pixels(96), *_TINY, "train.epochs=3",
            "method.predict=auto", "method.patches=4",
        ),
        methods=("fine_tune", "concept_tuning"),
        lrs=(1e-3,),
    ),
    "fruit_5_shots": Experiment(
        title="Fruit in a supermarket, 5 photos a class, EfficientNet-Lite0, 96 pixels",
        settings=(
            "data={demo}/groceries.parquet", *_LITE0, *_pixels(96), *_TINY,
            "train.epochs=8", "train.batch_size=14",
        ),
        methods=ALL,
        variants=_SOFT | _CONCEPT,
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
    "soft_lite0": Experiment(
        title="Soft Fine-tuning: fruit, source images of `tiny_imagenet200`, EfficientNet-Lite0, 96 pixels",
        settings=(
            "data={demo}/groceries.parquet", *_LITE0, *_pixels(96), *_TINY, "train.epochs=3",
            "report.discrimination=true",
            "report.unseen={assets}/datasets/flowers12/test",
            "report.source={assets}/datasets/tiny_imagenet200",
            "report.source_classes={assets}/datasets/tiny_imagenet200/classes.tsv",
        ),
        methods=("fine_tune",),
        variants=_schedules("{assets}/datasets/tiny_imagenet200"),
        lrs=(3e-4,),
    ),
    "soft_resnet20": Experiment(
        title="Soft Fine-tuning from CIFAR-10: photos of `pacs6` at 32 pixels, CIFAR ResNet-20",
        settings=(
            "data={assets}/datasets/pacs6/photo",
            "model.name=cifar_resnet20", "model.weights={assets}/weights/cifar10_resnet20.safetensors",
            *_pixels(32), *_TINY, "train.epochs=10",
            "report.discrimination=true",
            "report.unseen={assets}/datasets/flowers12",
            "report.source={work}/cifar10",
            "report.source_classes={work}/cifar10/classes.tsv",
        ),
        methods=("fine_tune",),
        variants=_schedules("{work}/cifar10"),
        lrs=(1e-3, 3e-3),
    ),
    "fine_grained": Experiment(
        title="Varieties of fruit, 10 photos a class, EfficientNet-Lite0, 96 pixels: Concept-Tuning and Bi-Tuning",
        settings=(
            "data={demo}/groceries.parquet", *_LITE0, *_pixels(96), *_TINY,
            "train.epochs=6", "train.batch_size=20", "method.predict=auto", "method.patches=4",
        ),
        methods=("fine_tune", "bi_tuning", "concept_tuning"),
        variants={
            "fine_tune, batch statistics": ("fine_tune", ("train.batchnorm=train",)),
            "bi_tuning, batch statistics": ("bi_tuning", ("train.batchnorm=train",)),
            "concept_tuning, in a projection": ("concept_tuning", ("method.embed=proj",)),
            "concept_tuning, from step 0": ("concept_tuning", ("method.contrast_warm_up=0.0",)),
            "concept_tuning, kept statistics": ("concept_tuning", ("train.batchnorm=frozen",)),
            "concept_tuning, channel slices": ("concept_tuning", ("method.concept_source=channel_slices",)),
        },
        lrs=(3e-4, 1e-3),
        shots=(10,),
    ),
    "why_rates": Experiment(
        title="Fruit, all training photos, all at the rate that plain fine-tuning chose, EfficientNet-Lite0, 96 pixels",
        settings=("data={demo}/groceries.parquet", *_LITE0, *_pixels(96), *_TINY, "train.epochs=3"),
        methods=("fine_tune", "l2_sp", "delta", "stoch_norm", "dr_tune", "tes", "daft"),
        lrs=(1e-3,),
    ),
    "why_dr_tune": Experiment(
        title="DR-Tune where it is behind: `flowers12`, 2 images a class, EfficientNet-Lite0",
        settings=_few_shot("flowers12", _LITE0, ()).settings,
        methods=("fine_tune", "dr_tune"),
        variants={
            "dr_tune, bank of 8": ("dr_tune", ("method.bank_size=8",)),
            "dr_tune, no rotation": ("dr_tune", ("method.rotation=off",)),
            "dr_tune, no calibration": ("dr_tune", ("method.rotation=off", "method.translation=false")),
            "dr_tune, 3 times the epochs": ("dr_tune", ("train.epochs=24",)),
            "fine_tune, 3 times the epochs": ("fine_tune", ("train.epochs=24",)),
        },
        lrs=(1e-4, 3e-4, 1e-3),
        shots=(2,),
    ),
    "why_co_tuning": Experiment(
        title="Co-Tuning where it is behind: `tf_flowers5`, 5 images a class, EfficientNet-Lite0",
        settings=_few_shot("tf_flowers5", _LITE0, ()).settings,
        methods=("fine_tune", "co_tuning"),
        variants={
            "co_tuning, weight 0.23": ("co_tuning", ("method.co_weight=0.23",)),
            "co_tuning, weight 0.023": ("co_tuning", ("method.co_weight=0.023",)),
        },
        lrs=(1e-4, 3e-4, 1e-3),
        shots=(5,),
    ),
}  # fmt: skip
