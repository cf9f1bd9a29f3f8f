"""The run configuration: every key a user may set, its type, range and default."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mooring.config.health_settings import HealthSettings
from mooring.config.method_settings import (
    DRTuneSettings,
    MethodSettings,
    method_names,
    method_tables,
)
from mooring.config.settings import Settings, given_path

_SET_NAME = re.compile(r"[A-Za-z0-9_-]+")  # a folder, a line of the log and a TensorBoard tag are named by it


class DataSettings(Settings):
    """Where the images are and how they are fed. ``data=DIR`` is short for ``data.path=DIR``."""

    path: Path = Field(
        strict=False,
        description="image folder, CSV/TSV/Parquet list, Parquet with image bytes, or a manifest folder",
    )
    source: Literal["auto", "dali", "torch"] = Field(
        default="auto", description="auto: DALI where installed, else torch"
    )
    augment: Literal["light", "standard", "strong"] = Field(
        default="standard", description="training augmentation"
    )
    val_fraction: float = Field(
        default=0.15, gt=0, lt=1, description="share of train used for validation where no val split is given"
    )
    shots: int | None = Field(
        default=None, ge=1, description="train on that many images per class, drawn by seed; none: on all"
    )
    fraction: float | None = Field(
        default=None, gt=0, le=1, description="train on that share of each class, drawn by seed; none: on all"
    )
    classes: tuple[str, ...] | None = Field(
        default=None,
        strict=False,
        min_length=2,
        description="classes that the run is about; the others are kept out of it; none: all",
    )
    unseen_classes: int | None = Field(
        default=None, ge=1, description="keep so many classes, drawn by seed, out of the run; none: no class"
    )
    workers: int = Field(
        default=2,
        ge=1,
        le=256,
        description="decoding threads (DALI) or processes (torch; 1 = in this process)",
    )
    max_pixels: int = Field(
        default=100_000_000, ge=1, description="larger images are quarantined by the scan, undecoded"
    )

    image_column: str | None = Field(
        default=None, min_length=1, description="column of a list with the path, or of Parquet with the image"
    )
    label_column: str | None = Field(
        default=None, min_length=1, description="column of a list with the class"
    )
    split_column: str | None = Field(
        default=None, min_length=1, description="column of a list with train, val or test"
    )

    extra_test: dict[str, Annotated[Path, Field(strict=False)]] = Field(
        default_factory=dict,
        description="further test sets by name, with classes of the run: data.extra_test.NAME=DIR; each is measured "
        "once, on the selected weights",
    )

    _path_is_given = field_validator("path", mode="before")(given_path)

    @field_validator("extra_test", mode="before")
    @classmethod
    def _each_has_a_name_and_a_path(cls, value: Any) -> Any:
        for name, path in value.items() if isinstance(value, dict) else ():
            if not _SET_NAME.fullmatch(str(name)):
                raise ValueError(f"expected names of letters, digits, - and _; got {str(name)!r}")
            try:
                given_path(path)
            except ValueError as err:
                raise ValueError(f"{name}: {err}") from None
        return value

    @field_validator("extra_test")
    @classmethod
    def _homes_are_expanded(cls, value: dict[str, Path]) -> dict[str, Path]:
        return {name: path.expanduser() for name, path in value.items()}

    @field_validator("path")
    @classmethod
    def _home_is_expanded(cls, value: Path) -> Path:
        return value.expanduser()

    @model_validator(mode="after")
    def _one_way_to_take_a_part(self) -> DataSettings:
        if self.shots is not None and self.fraction is not None:
            raise ValueError("data.shots and data.fraction both choose training images: give one of them")
        if self.classes is not None and self.unseen_classes is not None:
            raise ValueError(
                "data.classes and data.unseen_classes both choose the classes of the run: give one of them"
            )
        return self


class ModelSettings(Settings):
    """Which encoder, and where its pretrained weights come from."""

    name: str = Field(
        default="tf_efficientnet_lite0", min_length=1, description="a timm model name, or local-dir:FOLDER"
    )
    weights: str = Field(
        default="auto",
        min_length=1,
        description="auto: Mooring's weight cache, then timm's own download; none: random; "
        "or a .safetensors/.pth file",
    )
    drop_rate: float = Field(default=0.0, ge=0, lt=1, description="dropout before the head")
    drop_path_rate: float = Field(default=0.0, ge=0, lt=1, description="stochastic depth")


class TrainSettings(Settings):
    """Length, batch, resolution, precision and regularisation of the training loop."""

    epochs: int = Field(default=20, ge=1, le=100_000, description="passes over the training images")
    batch_size: int = Field(
        default=32,
        ge=1,
        description="images per step before accumulation, of all processes together; each takes an equal share",
    )
    accumulate: int = Field(default=1, ge=1, description="micro-batches per optimizer step")
    image_size: int | None = Field(
        default=None, ge=16, le=4096, description="training resolution; none: the model's own"
    )
    eval_size: int | None = Field(
        default=None, ge=16, le=4096, description="validation and test resolution; none: the model's own"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto: bf16 autocast on CUDA, fp32 on CPU"
    )
    channels_last: bool = Field(default=True, description="memory format of images and convolution weights")
    batchnorm: Literal["auto", "train", "frozen"] = Field(
        default="auto",
        description="auto: what the method is defined with, else frozen; frozen: keep the pretrained "
        "statistics, best on small data and small batches; "
        "train: batch statistics, as most papers do",
    )
    sync_batchnorm: bool = Field(
        default=True,
        description="with several processes, batch statistics are those of all their images together; false: each "
        "process uses its own, and running statistics are averaged when they are needed",
    )
    clip_grad_norm: float | None = Field(
        default=None, gt=0, description="largest global gradient norm; none: off"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="probability mass spread over all classes"
    )
    mixup: float = Field(default=0.0, ge=0, description="alpha of the Beta distribution; 0 is off")
    cutmix: float = Field(default=0.0, ge=0, description="alpha of the Beta distribution; 0 is off")
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="weight EMA; evaluated and exported where set"
    )
    compile: bool = Field(default=False, description="torch.compile the encoder")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: CUDA where there is one"
    )
    threads: int | None = Field(default=None, ge=1, description="torch CPU threads; none: torch's own choice")


class OptimizerSettings(Settings):
    """The optimizer and how the learning rate differs between parameter groups."""

    name: Literal["sgd", "adamw", "lamb"] = Field(default="adamw", description="update rule")
    implementation: Literal["auto", "torch", "apex"] = Field(
        default="auto", description="auto: apex where its kernels are found"
    )
    lr: float | None = Field(
        default=None, gt=0, description="backbone learning rate; none: a default for the optimizer"
    )
    head_lr_multiplier: float | None = Field(
        default=None, gt=0, description="head over backbone learning rate; none: the method's own"
    )
    layer_decay: float | None = Field(
        default=None, gt=0, le=1, description="learning-rate factor per layer group, head to stem; none: off"
    )
    weight_decay: float = Field(default=1e-4, ge=0, description="decoupled for adamw and lamb, L2 for sgd")
    decay_norm_and_bias: bool = Field(default=False, description="apply weight decay to 1-D parameters too")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd only")
    nesterov: bool = Field(default=True, description="sgd only")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), strict=False, description="adamw and lamb: decay of the two moments"
    )
    eps: float = Field(default=1e-8, gt=0, description="adamw and lamb: added to the denominator")

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> OptimizerSettings:
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0: set optimizer.nesterov=false or a momentum")
        return self


class ScheduleSettings(Settings):
    """The learning rate over the run, as a factor on each group's peak rate."""

    name: Literal["cosine", "linear", "step", "constant"] = Field(
        default="cosine", description="shape after the warm-up"
    )
    warmup_epochs: float = Field(
        default=1.0,
        ge=0,
        description="linear warm-up; a fifth of the run where it would be longer than the run",
    )
    final_ratio: float = Field(default=0.0, ge=0, le=1, description="last learning rate over the peak")
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(0.6, 0.8),
        strict=False,
        description="step: shares of the run at which the rate drops, increasing",
    )
    gamma: float = Field(default=0.1, gt=0, le=1, description="step: factor at each milestone")

    @field_validator("milestones")
    @classmethod
    def _milestones_increase(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(later <= earlier for earlier, later in pairwise(value)):
            raise ValueError("milestones must increase, as in [0.6, 0.8]")
        return value


class BackendSettings(Settings):
    """What runs the optimizer step, and how several processes share the work."""

    name: Literal["auto", "local", "ddp", "deepspeed"] = Field(
        default="auto",
        description="auto: local for one process, else deepspeed where installed, else ddp (every process holds all)",
    )
    zero_stage: int = Field(
        default=1,
        ge=0,
        le=3,
        description="deepspeed: what is divided among processes; 0: nothing, 1: optimizer state, 2: gradients too, "
        "3: parameters too",
    )
    offload_optimizer: bool = Field(
        default=False, description="deepspeed: optimizer state in host memory, stepped there"
    )
    offload_parameters: bool = Field(
        default=False, description="deepspeed, zero_stage=3: parameters in host memory until they are needed"
    )
    sharded_loading: bool | Literal["auto"] = Field(
        default="auto",
        description="deepspeed, zero_stage=3: read pretrained parameters one by one, each process keeping its part; "
        "auto: where they take more than a quarter of the device's memory, and method and weights allow it",
    )
    deepspeed_config: Path | None = Field(
        default=None,
        strict=False,
        description="JSON file with further DeepSpeed settings; those that another setting here decides are refused",
    )
    activation_checkpointing: bool = Field(
        default=False, description="compute activations again in the backward pass instead of keeping them"
    )
    timeout_minutes: float = Field(
        default=30.0, gt=0, description="how long a process waits for another one before it gives up"
    )


class CheckpointSettings(Settings):
    """When the state of the run is saved, and what is kept. It is saved after each validation in any case."""

    every: int | None = Field(
        default=None, ge=1, description="optimizer steps between saved states; none: after each epoch only"
    )
    keep_last: int = Field(default=2, ge=1, description="newest states that stay")
    keep_best: int = Field(default=0, ge=0, description="states with the best validation that stay, too")
    keep_every: int | None = Field(
        default=None, ge=1, description="states of steps that are multiples of it stay, too; none: no others"
    )
    background: bool = Field(
        default=True, description="write while the training goes on, from one copy in host memory"
    )


class ReportSettings(Settings):
    """What is shown and written while the run goes on."""

    progress: Literal["auto", "bar", "plain", "quiet"] = Field(
        default="auto", description="auto: bar on a terminal, else plain"
    )
    log_every: int = Field(default=10, ge=1, description="optimizer steps between drained metrics")
    tensorboard: bool = Field(default=True, description="write TensorBoard events into the run folder")
    plots: bool = Field(default=True, description="draw curves.png and confusion.png at the end")
    distortion: bool = Field(
        default=False,
        description="measure how far the selected encoder's features are from the pretrained ones, on every "
        "evaluated set; costs two forward passes over them and a copy of the encoder",
    )
    discrimination: bool = Field(
        default=False,
        description="measure after each epoch what the encoder tells apart of classes that the run is not about "
        "(kept out by data.unseen_classes or data.classes, or in report.unseen), and of the source task",
    )
    unseen: Path | None = Field(
        default=None, strict=False, description="discrimination: images of classes that the run is not about"
    )
    source: Path | None = Field(
        default=None,
        strict=False,
        description="discrimination: images of the task the weights were trained for, measured on their validation "
        "split; none: method.source_data where the method reads it",
    )
    source_classes: Path | None = Field(
        default=None, strict=False, description="as method.source_classes, for report.source"
    )

    _paths_are_given = field_validator("unseen", "source", "source_classes", mode="before")(given_path)

    @model_validator(mode="after")
    def _paths_are_for_a_measurement(self) -> ReportSettings:
        given = [name for name in ("unseen", "source", "source_classes") if getattr(self, name) is not None]
        if given and not self.discrimination:
            raise ValueError(
                f"report.{given[0]} is read where report.discrimination=true: set it, or leave it out"
            )
        if self.source_classes is not None and self.source is None:
            raise ValueError(
                "report.source_classes says what the classes of report.source are: give report.source"
            )
        return self


class RunConfig(Settings):
    """One training run. ``RunConfig(data="photos")`` alone is a good run."""

    data: DataSettings
    out: Path | None = Field(
        default=None, strict=False, description="run folder; none: runs/<data>-<model>-<method>-<time>"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="of every random generator of the run")
    resume: str | None = Field(
        default=None,
        min_length=1,
        description="run folder to continue, or auto: continue `out` where it can be",
    )
    allow_inexact: bool = Field(
        default=False,
        description="with resume: go on where the run cannot continue bit for bit, and record it",
    )
    model: ModelSettings = ModelSettings()
    method: MethodSettings = DRTuneSettings()
    train: TrainSettings = TrainSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    backend: BackendSettings = BackendSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    report: ReportSettings = ReportSettings()
    health: HealthSettings = HealthSettings()

    @field_validator("data", mode="before")
    @classmethod
    def _path_is_short_for_data(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | Path) else value

    @field_validator("method", mode="before")
    @classmethod
    def _short_forms_of_method(cls, value: Any) -> Any:
        if isinstance(value, str | list | tuple):
            value = {"name": value}
        if not isinstance(value, dict):
            return value
        if "name" not in value:
            # settings without a name are the default method's
            return {"name": DRTuneSettings().name, **value}
        names = method_names(value["name"])
        if len(names) == 1:
            return {**value, "name": names[0]}
        # each method of a combination takes the settings it has
        tables = method_tables()
        settings = {key: inner for key, inner in value.items() if key != "name"}
        return {
            "name": "combined",
            "parts": [
                {"name": name} | {k: v for k, v in settings.items() if k in tables[name].model_fields}
                if name in tables
                else {"name": name}
                for name in names
            ],
        }

    @field_validator("out")
    @classmethod
    def _home_is_expanded(cls, value: Path | None) -> Path | None:
        return value.expanduser() if value is not None else None

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.schedule.warmup_epochs >= self.train.epochs:
            # a warm-up as long as the run would never reach the peak rate
            object.__setattr__(
                self, "schedule", self.schedule.model_copy(update={"warmup_epochs": self.train.epochs / 5})
            )
        return self
