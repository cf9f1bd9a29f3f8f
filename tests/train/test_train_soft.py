"""Soft Fine-tuning in the engine: the source stream beside the target's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mooring import Engine
from mooring.config.load import absolute_paths
from mooring.errors import ConfigError, DataError, MooringError
from mooring.models.torchvision_shim import import_torchvision

SOURCE = 5


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with a classifier of ``SOURCE`` classes."""
    import_torchvision()
    import timm

    torch.manual_seed(7)
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=SOURCE).state_dict(), file)
    return file


def write_source(root: Path, classes: int) -> Path:
    """Another brightness for each class."""
    rng = np.random.default_rng(9)
    for c in range(classes):
        for split, count in (("train", 5), ("val", 2)):
            folder = root / split / f"s{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (40, 44, 3)).astype(np.uint8) // (c + 1)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def source_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), SOURCE)


@pytest.fixture
def soft_config(make_config, pretrained: Path, source_photos: Path):
    def build(method: dict[str, object] | None = None, **changes: object):
        settings = {"name": "soft_fine_tuning", "source_data": source_photos, **(method or {})}
        if settings.get("source") == "distill":
            del settings["source_data"]
        return make_config(
            **{"model": {"weights": str(pretrained)}, "method": settings, **changes},
        )

    return build


def steps(engine: Engine, count: int) -> None:
    while count:
        for group in engine.epoch_groups():
            engine.step(group)
            count -= 1
            if count == 0:
                return


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in engine.method.state_dict().items()}


@pytest.mark.parametrize(
    "case",
    [
        ("torch", {"source_batch_size": 12, "soft_fraction": 0.8}, {"batchnorm": "train", "accumulate": 2}),
        ("dali", {"source_batch_size": 12, "soft_fraction": 0.8}, {"batchnorm": "train", "accumulate": 2}),
        ("torch", {"source_bn": "shared"}, {"batchnorm": "frozen", "mixup": 0.3}),
        ("torch", {"source": "distill"}, {}),
    ],
    ids=["torch", "dali", "mixed", "distill"],
)
def test_state_taken_mid_epoch_continues_bit_for_bit(soft_config, tmp_path: Path, case: tuple) -> None:
    source, method, train = case
    options = {
        "method": method,
        "data": {"source": source},
        "train": {"batch_size": 3, "epochs": 3, **train},
    }
    ends = []
    with Engine.build(soft_config(**options)) as whole, Engine.build(soft_config(**options)) as first:
        steps(whole, 7)
        steps(first, 3)
        ref = first.save("test")
    torch.randn(100)
    with Engine.build(soft_config(**options, resume="auto")) as second:
        second.resume(ref)
        steps(second, 4)
        ends = [state_of(whole), state_of(second)]
        if whole.source_stream is not None:
            assert whole.source_stream.state_dict() == second.source_stream.state_dict()
    for (name, a), b in zip(ends[0].items(), ends[1].values(), strict=True):
        assert torch.equal(a, b), name


def test_zero_is_plain_fine_tuning_to_the_last_bit(soft_config) -> None:
    """Order of images, augmentation, stochastic depth and BatchNorm included."""
    ends = []
    for method in ({"name": "fine_tune"}, {"name": "soft_fine_tuning", "soft_schedule": "zero"}):
        config = soft_config(train={"batchnorm": "train"})
        model = config.model.model_copy(update={"drop_path_rate": 0.2, "drop_rate": 0.2})
        table = type(config).model_validate({"data": "x", "method": method}).method
        with Engine.build(config.model_copy(update={"method": table, "model": model})) as engine:
            assert engine.source_stream is None
            steps(engine, 5)
            ends.append(state_of(engine))
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_a_run_fades_the_source_loss_out_and_exports_the_target_only(soft_config) -> None:
    engine = Engine.build(soft_config({"soft_fraction": 0.5}))
    assert engine.source_stream is not None and engine.method.resources.source_batch_size == 6
    seen: list[tuple[int, int]] = []
    forward = engine.method.forward

    def counted(batch, at):
        seen.append((at.step, 0 if batch.source is None else len(batch.source.labels)))
        if batch.source is not None:
            assert batch.source.images.shape[1:] == batch.images.shape[1:]
            assert set(batch.source.labels.tolist()) <= set(range(SOURCE))
        return forward(batch, at)

    engine.method.forward = counted
    result = engine.fit()
    total = engine.total_steps
    assert [rows for _, rows in seen] == [6 if step < total / 2 else 0 for step in range(total)]
    assert engine.source_stream.source._stream is None  # nothing reads ahead any more
    assert result.test is not None
    exported = result.run / "model"
    assert not any("source" in path.name for path in exported.iterdir())


def test_source_data_that_does_not_fit_is_refused_before_training(
    soft_config, source_photos: Path, tmp_path: Path
) -> None:
    def refused(error: type[MooringError], message: str, **method: object) -> None:
        with pytest.raises(error, match=message):
            Engine.build(soft_config(method))

    refused(ConfigError, "method.source=distill", source_data=None)
    refused(DataError, "nowhere", source_data=tmp_path / "nowhere")
    refused(DataError, "source_batch_size", source_batch_size=26)
    refused(DataError, "lacks s1", source_classes=_text(tmp_path / "one.csv", "s0,0\n"))
    outside = "".join(f"s{i},{i + 1}\n" for i in range(SOURCE))
    refused(DataError, "s4 -> 5", source_classes=_text(tmp_path / "out.csv", outside))
    other = write_source(tmp_path / "photos", 3)
    refused(DataError, "has 3 classes and the classifier of the weights 5", source_data=other)
    mapped = _text(tmp_path / "turned.csv", "".join(f"s{i},{4 - i}\n" for i in range(SOURCE)))
    with Engine.build(soft_config({"source_classes": mapped})) as engine:
        split = engine.source_stream.source.split
        assert split.classes == ("s4", "s3", "s2", "s1", "s0")
        assert all(split.paths[i].split("/")[-2] == f"s{4 - label}" for i, label in enumerate(split.labels))


def test_paths_of_a_method_do_not_depend_on_the_current_folder(soft_config) -> None:
    config = absolute_paths(soft_config({"source_data": Path("here"), "source_classes": Path("names.csv")}))
    assert config.method.source_data == Path("here").absolute()
    assert config.method.source_classes == Path("names.csv").absolute()


def _text(file: Path, text: str) -> Path:
    file.write_text(text)
    return file
