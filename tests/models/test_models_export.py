from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mooring.errors import RunFolderError, WeightsError
from mooring.models.encoder import Encoder, build_encoder
from mooring.models.export import assemble, export
from mooring.models.head import build_head

CLASSES = ["rose", "tulip", "dandelion", "sun flower", "Gänseblümchen"]
# image size per model; None: its classifier is a 1x1 convolution, which rounds differently
EXACT = {
    "test_efficientnet": 96,
    "tf_efficientnet_lite0": 64,
    "resnet18": 64,
    "test_vit": 96,
    "vit_tiny_patch16_224": 64,
    "swin_tiny_patch4_window7_224": 64,
    "convnext_atto": 64,
    "mobilenetv3_small_050": 64,
    "cifar_resnet20": 32,
    "resnetv2_50": None,
}


def trained(name: str, size: int | None = None) -> tuple[Encoder, nn.Linear]:
    """An encoder and a head whose tensors are not at their initial values."""
    torch.manual_seed(0)
    encoder = build_encoder(name, weights="none", image_size=size or 64)
    encoder.data_config["input_size"] = (3, size or 64, size or 64)
    head = build_head(encoder.feature_dim, len(CLASSES), std=0.1)
    with torch.no_grad():
        head.bias.normal_()
        for norm in encoder.modules():
            if isinstance(norm, nn.BatchNorm2d | nn.LayerNorm):
                norm.bias.normal_(std=0.1)
                norm.weight.add_(torch.randn_like(norm.weight) * 0.1)
    return encoder, head


def opened(folder: Path) -> nn.Module:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def images(encoder: Encoder) -> Tensor:
    return torch.randn(3, *encoder.data_config["input_size"], generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(encoder: Encoder, head: nn.Linear, x: Tensor) -> Tensor:
    return head(encoder.eval()(x))


@pytest.mark.parametrize("name", EXACT)
def test_timm_opens_the_folder_with_the_same_logits(name: str, tmp_path: Path) -> None:
    import timm

    encoder, head = trained(name, EXACT[name])
    assert export(encoder, head, tmp_path / "model", CLASSES) == tmp_path / "model"
    model = opened(tmp_path / "model")
    x = images(encoder)
    with torch.no_grad():
        got = model(x)
    expected = logits(encoder, head, x)
    if EXACT[name] is not None:
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    config = timm.data.resolve_model_data_config(model)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()} == encoder.data_config
    assert model.pretrained_cfg["label_names"] == CLASSES and model.num_classes == len(CLASSES)


def test_the_folder_is_an_encoder_again(tmp_path: Path) -> None:
    encoder, head = trained("test_vit", 96)
    export(encoder, head, tmp_path / "model", CLASSES)
    again = build_encoder(f"local-dir:{tmp_path / 'model'}").eval()
    x = images(encoder)
    with torch.no_grad():
        assert torch.equal(again(x), encoder.eval()(x))
    # and can be exported in its turn, at its own size
    export(again, head, tmp_path / "second", CLASSES)
    with torch.no_grad():
        assert torch.equal(opened(tmp_path / "second")(x), opened(tmp_path / "model")(x))


def test_the_config_says_what_was_trained(tmp_path: Path) -> None:
    encoder, head = trained("test_efficientnet")
    preparation = {"input_size": (3, 80, 80), "crop_pct": 1.0, "mean": (0.1, 0.2, 0.3)}
    export(encoder, head, tmp_path, CLASSES, preparation, {"method": "dr_tune"})
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    assert config["label_names"] == CLASSES and config["mooring"] == {"method": "dr_tune"}
    described = config["pretrained_cfg"]
    assert described["input_size"] == [3, 80, 80] and described["crop_pct"] == 1.0
    assert described["mean"] == [0.1, 0.2, 0.3] and described["num_classes"] == len(CLASSES)
    assert not {"url", "hf_hub_id", "file", "test_input_size"} & set(described)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_fixed_size_model_keeps_the_size_its_weights_fit(tmp_path: Path) -> None:
    encoder, head = trained("test_vit", 96)
    export(encoder, head, tmp_path, CLASSES, {"input_size": (3, 160, 160)})
    with torch.no_grad():
        assert torch.equal(opened(tmp_path)(images(encoder)), logits(encoder, head, images(encoder)))


def test_export_changes_nothing_in_the_run(tmp_path: Path) -> None:
    encoder, head = trained("test_resnet")
    encoder.train()
    encoder.model.layer1.eval()
    modes = [m.training for m in encoder.modules()]
    state = {k: v.clone() for k, v in encoder.state_dict().items()}
    rng = torch.get_rng_state()
    export(encoder, head, tmp_path, CLASSES)
    assert torch.equal(rng, torch.get_rng_state()) and modes == [m.training for m in encoder.modules()]
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())
    first = (tmp_path / "model.safetensors").read_bytes()
    export(encoder, head, tmp_path, CLASSES)  # a later, better epoch takes the same place
    assert (tmp_path / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize("name", ["levit_128s", "caformer_s18"])
def test_an_architecture_with_more_than_a_linear_classifier_is_refused(name: str, tmp_path: Path) -> None:
    encoder = build_encoder(name, weights="none", image_size=64 if name == "caformer_s18" else None)
    head = build_head(encoder.feature_dim, 3)
    with pytest.raises(WeightsError, match=f"{name} cannot be exported"):
        assemble(encoder, head)
    with pytest.raises(WeightsError, match=f"{name} cannot be exported"):
        export(encoder, head, tmp_path / "model", ["a", "b", "c"])
    assert not (tmp_path / "model").exists()


def test_an_encoder_that_is_no_longer_timms_is_refused(tmp_path: Path) -> None:
    encoder, head = trained("test_resnet")
    encoder.model.extra = nn.Linear(2, 2)
    with pytest.raises(WeightsError, match=r"extra\.weight"):
        export(encoder, head, tmp_path, CLASSES)


def test_wrong_number_of_names_and_unwritable_folder(tmp_path: Path) -> None:
    encoder, head = trained("test_resnet")
    with pytest.raises(ValueError, match="5 classes; got 2"):
        export(encoder, head, tmp_path, CLASSES[:2])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        export(encoder, head, tmp_path / "file" / "model", CLASSES)
