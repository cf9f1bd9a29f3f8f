"""The residual networks for 32-pixel images of He et al. 2016, section 4.2, which timm lacks, as timm models.

Importing this registers them: ``timm.create_model("cifar_resnet20")`` and folders that name one of them open
afterwards. A stem of 16 channels, then three stages of 16, 32 and 64 channels, the second and third halving the map.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mooring.models.torchvision_shim import import_timm

timm = import_timm()

_WIDTHS = (16, 32, 64)
# Blocks per stage: depth = 6 n + 2.
_BLOCKS = {20: 3, 32: 5, 44: 7, 56: 9, 110: 18}


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": timm.data.IMAGENET_DEFAULT_MEAN,
        "std": timm.data.IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "linear",
    }


default_cfgs = timm.models.generate_default_cfgs({f"cifar_resnet{depth}": _cfg() for depth in _BLOCKS})


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (option A of the paper).

    Where the shape changes, the shortcut takes every second row and column and has zeros for the new channels, half of
    them before and half behind the old ones: the paper does not say where, the public weights are of this form.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H / stride, W / stride] of maps [B, in_channels, H, W]."""
        shortcut = x
        if self.stride > 1 or self.new_channels:
            before = self.new_channels // 2
            shortcut = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before)
            )
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


class CifarResNet(nn.Module):
    """A CIFAR ResNet with timm's interface; parameter names are those of the public weights.

    Args:
        blocks: n, blocks of each stage.
        num_classes: C; 0 leaves the classifier out.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier.
        global_pool: ``avg``, or empty for the map itself.
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = _WIDTHS[-1]
        self.conv1 = nn.Conv2d(in_chans, _WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.relu = nn.ReLU()  # a module: timm's features_only runs the children one after another
        self.layer1, self.layer2, self.layer3 = (
            _stage(before, width, blocks, 1 if width == _WIDTHS[0] else 2)
            for before, width in zip((_WIDTHS[0], *_WIDTHS), _WIDTHS, strict=False)
        )
        self.feature_info = [
            {"num_chs": width, "reduction": 2**stage, "module": f"layer{stage + 1}"}
            for stage, width in enumerate(_WIDTHS)
        ]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.reset_classifier(num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layers for layer-wise rates, as timm's own ResNets give them."""
        return {
            "stem": r"^(?:conv1|bn1)\.",
            "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)",
        }

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Gives the model a new classifier, or none with 0 classes."""
        if global_pool is not None:
            if global_pool not in ("", "avg"):
                raise ValueError(f"global_pool must be 'avg' or ''; got {global_pool!r}")
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.linear = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map [B, 64, H / 4, W / 4] of images [B, 3, H, W]."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, C] of the last map; the pooled features [B, 64] with ``pre_logits`` or without classifier."""
        x = x.mean((2, 3)) if self.global_pool else x
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] of normalised images [B, 3, H, W]; features [B, 64] without classifier."""
        return self.forward_head(self.forward_features(x))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    later = [BasicBlock(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(in_channels, channels, stride), *later)


def _built(depth: int, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    return timm.models.build_model_with_cfg(
        CifarResNet,
        f"cifar_resnet{depth}",
        pretrained,
        blocks=_BLOCKS[depth],
        feature_cfg={"out_indices": (0, 1, 2)},
        **kwargs,
    )


@timm.models.register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CIFAR ResNet-20, 0.27 M parameters."""
    return _built(20, pretrained, kwargs)


@timm.models.register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CIFAR ResNet-32, 0.46 M parameters."""
    return _built(32, pretrained, kwargs)


@timm.models.register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CIFAR ResNet-44, 0.66 M parameters."""
    return _built(44, pretrained, kwargs)


@timm.models.register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CIFAR ResNet-56, 0.85 M parameters."""
    return _built(56, pretrained, kwargs)


@timm.models.register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CIFAR ResNet-110, 1.7 M parameters."""
    return _built(110, pretrained, kwargs)
