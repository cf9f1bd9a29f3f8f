"""The classifier that pretrained weights came with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mooring.errors import WeightsError
from mooring.models.encoder import build_encoder
from mooring.models.pretrained_head import pretrained_head
from mooring.models.torchvision_shim import import_timm

timm = import_timm()


def saved(name: str, folder: Path) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    save_file(
        {key: value.clone() for key, value in model.state_dict().items()}, folder / "weights.safetensors"
    )
    return model, folder / "weights.safetensors"


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_convnext", "mobilenetv3_small_050", "cifar_resnet20"]
)
def test_encoder_and_head_give_the_pretrained_logits(name: str, tmp_path: Path) -> None:
    model, weights = saved(name, tmp_path)
    encoder = build_encoder(name, weights=weights).eval()
    images = torch.randn(2, *encoder.data_config["input_size"])
    with torch.no_grad():
        logits = pretrained_head(name, encoder.feature_dim, weights=weights)(encoder(images))
        torch.testing.assert_close(logits, model(images))


def test_a_model_with_two_classifiers_is_refused(tmp_path: Path) -> None:
    # its logits are the mean of both, over two tokens: neither alone over the pooled features gives them
    name = "deit_tiny_distilled_patch16_224"
    _, weights = saved(name, tmp_path)
    with pytest.raises(WeightsError, match=r"has 2 .*head_dist"):
        pretrained_head(name, 192, weights=weights)
