from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mooring.errors import ConfigError, WeightsError
from mooring.models.encoder import Encoder, build_encoder

REAL = {
    "vit_tiny_patch16_224": "vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors",
    "tf_efficientnet_lite0": "tf_efficientnet_lite0.in1k.fp16.safetensors",
    "mobilenetv2_100": "mobilenetv2_100.in1k_features.fp16.safetensors",
}


@pytest.mark.parametrize(
    ("name", "image_size", "width"),
    [
        ("resnet18", 64, 512),
        ("convnext_atto", 64, 320),
        ("test_vit", 96, 64),
        ("swin_tiny_patch4_window7_224", 64, 768),
        ("mobilenetv3_small_050", 64, 1024),  # timm's num_features says 288
        ("tf_efficientnet_lite0", None, 1280),
    ],
)
def test_pooled_features_of_each_family(name: str, image_size: int | None, width: int) -> None:
    encoder = build_encoder(name, weights="none", image_size=image_size).eval()
    side = image_size or 224
    # evaluation may still use the size of the weights where the architecture takes any
    own = side if encoder.fixed_input_size else 224
    assert encoder.data_config["input_size"] == (3, own, own)
    assert encoder.feature_dim == width
    with torch.no_grad():
        features = encoder(torch.randn(3, 3, side, side))
    assert features.shape == (3, width) and features.dtype == torch.float32


def test_data_config_is_the_models_own() -> None:
    config = build_encoder("tf_efficientnet_lite0", weights="none").data_config
    assert config["mean"] == (0.5, 0.5, 0.5) and config["std"] == (0.5, 0.5, 0.5)
    assert config["interpolation"] == "bicubic" and config["crop_pct"] == 0.875
    tagged = build_encoder("vit_tiny_patch16_224.augreg_in21k_ft_in1k", weights="none")
    assert tagged.architecture == "vit_tiny_patch16_224" and tagged.data_config["crop_pct"] == 0.9
    assert tagged.fixed_input_size and not build_encoder("test_resnet", weights="none").fixed_input_size


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet5O", "resnet50"),
        ("ViT_tiny_patch16_224", "vit_tiny_patch16_224"),
        ("resnet18.nonsense", "a1_in1k"),
        ("some/path", "timm has no model"),
        ("", "timm has no model"),
        ("local-dir:nowhere", "config.json"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_encoder(name, weights="none")


def test_an_image_size_the_model_cannot_take_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="100"):
        build_encoder("test_vit", weights="none", image_size=100)


def test_an_option_the_architecture_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="drop_path_rate"):
        build_encoder("vgg11", weights="none", image_size=32, drop_path_rate=0.1)


def test_dropout_acts_in_training_only() -> None:
    encoder = build_encoder("test_resnet", weights="none", drop_rate=0.5)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        encoder.train()
        assert (encoder(images) == 0).float().mean() > 0.2
        encoder.eval()
        assert torch.equal(encoder(images), encoder(images))


def write_local_dir(folder: Path, name: str, num_classes: int = 7) -> dict[str, Tensor]:
    import timm

    model = timm.create_model(name, num_classes=num_classes)
    state = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    config = {"architecture": name, "num_classes": num_classes, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (folder / "config.json").write_text(json.dumps(config))
    return state


def test_local_dir_is_opened_with_its_weights_and_config(tmp_path: Path) -> None:
    state = write_local_dir(tmp_path / "m", "test_resnet")
    encoder = build_encoder(f"local-dir:{tmp_path / 'm'}")
    own = encoder.model.state_dict()
    assert all(torch.equal(own[key], state[key]) for key in own)
    assert encoder.architecture == "test_resnet" and tuple(encoder.data_config["mean"]) == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ("{", ConfigError),
        ("[]", ConfigError),
        ('{"architecture": "os.system"}', ConfigError),
        ('{"architecture": "test_resnet", "pretrained_cfg": {}}', WeightsError),
    ],
)
def test_a_broken_local_dir_is_refused(config: str, error: type[Exception], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(error, match=str(tmp_path.name)):
        build_encoder(f"local-dir:{tmp_path}")


def images_of(folder: Path, encoder: Encoder, per_class: int, side: int) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(encoder.data_config[key]).view(3, 1, 1) for key in ("mean", "std"))
    rows, labels = [], []
    for label, of_class in enumerate(sorted(p for p in folder.iterdir() if p.is_dir())):
        for file in sorted(of_class.iterdir())[:per_class]:
            image = Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3)
            rows.append((pixels.permute(2, 0, 1) / 255 - mean) / std)
            labels.append(label)
    return torch.stack(rows), torch.tensor(labels)


@pytest.mark.assets
@pytest.mark.parametrize("name", REAL)
def test_real_weights_separate_real_classes(name: str, assets: Path) -> None:
    """Nearest class mean from 4 flowers a class; random weights stay far below."""
    size = 128
    accuracy = {}
    for weights in (str(assets / "weights" / REAL[name]), "none"):
        torch.manual_seed(0)
        encoder = build_encoder(name, weights=weights, image_size=size).eval()
        train, train_labels = images_of(assets / "datasets" / "flowers12" / "train", encoder, 4, size)
        test, test_labels = images_of(assets / "datasets" / "flowers12" / "test", encoder, 3, size)
        with torch.inference_mode():
            train_features, test_features = encoder(train), encoder(test)
        centre, spread = train_features.mean(0), train_features.std(0) + 1e-6
        train_features, test_features = (train_features - centre) / spread, (test_features - centre) / spread
        classes = int(train_labels.max()) + 1
        means = torch.stack([train_features[train_labels == c].mean(0) for c in range(classes)])
        predicted = (F.normalize(test_features, dim=1) @ F.normalize(means, dim=1).T).argmax(1)
        accuracy[weights] = float((predicted == test_labels).float().mean())
    real, random = accuracy.values()
    # chance is 1/12; with 36 test images 0.6 is out of reach of the random network
    assert real > 0.6 and real > random + 0.2, accuracy


@pytest.mark.assets
def test_position_embeddings_are_resampled(assets: Path) -> None:
    file = assets / "weights" / REAL["vit_tiny_patch16_224"]
    encoders = {
        s: build_encoder("vit_tiny_patch16_224", weights=file, image_size=s).eval() for s in (224, 160)
    }
    assert encoders[160].model.state_dict()["pos_embed"].shape[1] == 1 + (160 // 16) ** 2
    features = []
    for size, encoder in encoders.items():
        images, _ = images_of(assets / "datasets" / "flowers12" / "test", encoder, 1, size)
        with torch.inference_mode():
            rows = encoder(images)
        features.append(F.normalize(rows - rows.mean(0), dim=1))
    # the same twelve photos at both sizes: each is closest to itself, and by far
    similarity = features[0] @ features[1].T
    others = similarity - 2 * torch.eye(len(similarity))
    assert torch.equal(similarity.argmax(1), torch.arange(len(similarity)))
    assert similarity.diagonal().mean() > others.amax(1).mean() + 0.2
