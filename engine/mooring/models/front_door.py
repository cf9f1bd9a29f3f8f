"""The front-door head of Concept-Tuning: two attentions over the last map, a variational bottleneck, a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mooring.models.last_map import last_map
from mooring.syncing import make_folder, replace_durably
from mooring_kernels import channel_attention

# At the start softplus(rho - 5) is about 0.007: next to no noise.
_QUIET = 5.0
_FILE = "front_door.safetensors"
_FAR = 20.0  # exp(-20) is below half a spacing of fp32 at 1


class FrontDoorOutput(NamedTuple):
    """What the head says of a batch; a tuple, in which a wrapper around modules finds the tensors.

    Attributes:
        logits: [B, C] fp32.
        mean: mu, [B, d] fp32.
        rho: [B, d] fp32; the deviation is ``softplus(rho - 5)``.
    """

    logits: Tensor
    mean: Tensor
    rho: Tensor


class FrontDoorHead(nn.Module):
    """``phi(e)`` with ``e = mu + sigma eps``, ``[mu; rho] = A(attended map)``, ``sigma = softplus(rho - 5)``.

    With X the map of one image as D x N, the attentions are

        position: S = softmax_rows((Wq X + bq)^T (Wk X + bk)),       Y_pos = g_p (Wv X + bv) S^T + X
        channel:  S' = softmax_rows(rowmax(E) - E), E = X X^T,       Y_ch = g_c S' X + X

    and A is linear on the mean over positions of ``Y_pos + Y_ch`` (``fusion="sum"``), or an MLP on both means
    (``"concat_mlp"``). Gains g_p and g_c start at 0. Without noise, e = mu.

    Args:
        width: D.
        classes: C.
        bottleneck: d.
        fusion: as above.

    Source: arXiv 2311.06868; ``"sum"`` is the public code, ``"concat_mlp"`` a figure caption of the paper.
    """

    def __init__(
        self, width: int, classes: int, bottleneck: int, fusion: Literal["sum", "concat_mlp"] = "sum"
    ) -> None:
        super().__init__()
        narrow = max(1, width // 8)
        self.queries = nn.Linear(width, narrow)
        self.keys = nn.Linear(width, narrow)
        self.values = nn.Linear(width, width)
        # [1], not []: DeepSpeed cannot broadcast a tensor without dimensions
        self.position_gain = nn.Parameter(torch.zeros(1))
        self.channel_gain = nn.Parameter(torch.zeros(1))
        self.fusion = fusion
        self.mediator: nn.Module = (
            nn.Linear(width, 2 * bottleneck)
            if fusion == "sum"
            else nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 2 * bottleneck))
        )
        self.classifier = nn.Linear(bottleneck, classes)
        self.bottleneck = bottleneck

    def forward(self, feature_map: Tensor, noise: Tensor | None = None) -> FrontDoorOutput:
        """
        Args:
            feature_map: [B, D, H, W].
            noise: eps, [B, d]; None: e = mu.
        """
        x = feature_map.flatten(2)  # [B, D, N]
        tokens = x.transpose(1, 2)
        queries, keys, values = self.queries(tokens), self.keys(tokens), self.values(tokens)
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            # no 1 / sqrt(d) in front, so scores are large and bf16 would lose the differences between them
            shares = torch.bmm(queries.float(), keys.float().transpose(1, 2)).softmax(2)  # [B, N, N]
            position = self.position_gain * torch.bmm(shares, values.float()).transpose(1, 2) + x
            channel = self.channel_gain * channel_attention(x) + x
            if self.fusion == "sum":
                pooled = (position + channel).mean(2)
            else:
                pooled = torch.cat([position.mean(2), channel.mean(2)], 1)
            mean, rho = self.mediator(pooled).chunk(2, 1)
            sample = mean if noise is None else mean + F.softplus(rho - _QUIET) * noise
            return FrontDoorOutput(self.classifier(sample), mean, rho)


def bottleneck_divergence(output: FrontDoorOutput, valid: Tensor, form: Literal["code", "vib"]) -> Tensor:
    """Mean over the valid rows of ``KL(N(mu, s^2) || N(0, I))``, summed over the bottleneck; fp32 scalar.

    Args:
        output: of the head.
        valid: [B] bool.
        form: ``"vib"``: s = sigma. ``"code"``: s = exp(sigma), as the public code has it; least at sigma = 0, so it
            takes the noise away.
    """
    inner = output.rho - _QUIET
    sigma = F.softplus(inner)
    if form == "code":
        terms = 0.5 * (torch.expm1(2 * sigma) + output.mean.square()) - sigma
    else:
        # softplus(x) is exp(x) far below 0, where its logarithm would be that of an underflown number
        low = inner < -_FAR
        log_sigma = torch.where(low, inner, F.softplus(inner.clamp_min(-_FAR)).log())
        terms = 0.5 * (sigma.square() + output.mean.square() - 1) - log_sigma
    rows = torch.where(valid, terms.sum(1), 0.0)
    return rows.sum() / valid.sum().clamp_min(1)


def joined(classifier_logits: Tensor, front_door_logits: Tensor, choice: str) -> Tensor:
    """Test-time logits [B, C] of ``"cls"``, ``"fd"`` or ``"avg"``: the mean of both log-softmaxes."""
    if choice == "cls":
        return classifier_logits
    if choice == "fd":
        return front_door_logits
    return (classifier_logits.float().log_softmax(1) + front_door_logits.float().log_softmax(1)) / 2


class FrontDoorModel(nn.Module):
    """A timm model and a front-door head that predict together, on one forward of the model.

    Args:
        model: with its classifier.
        front_door: on the model's last map.
        choice: see ``joined``.
    """

    def __init__(self, model: nn.Module, front_door: FrontDoorHead, choice: str) -> None:
        super().__init__()
        self.model = model
        self.front_door = front_door
        self.choice = choice

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of images [B, 3, H, W]."""
        model: Any = self.model
        hidden = model.forward_features(images)
        feature_map = last_map(model, hidden, (images.shape[-2], images.shape[-1]))
        return joined(model.forward_head(hidden), self.front_door(feature_map).logits, self.choice)


def save_front_door(folder: Path, front_door: FrontDoorHead, choice: str) -> dict[str, Any]:
    """Writes the head beside the exported model; the file is replaced as a whole.

    Args:
        folder: of the exported model; created where missing.
        front_door: the head.
        choice: see ``joined``.

    Returns:
        What ``with_front_door`` has to find under ``mooring`` in the model's ``config.json``.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in front_door.state_dict().items()}
    make_folder(folder)
    partial = folder / f"{_FILE}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    replace_durably(partial, folder / _FILE)
    shape = {"bottleneck": front_door.bottleneck, "fusion": front_door.fusion}
    return {"predict": choice, "front_door": shape}


def with_front_door(model: nn.Module, folder: Path, described: Mapping[str, Any]) -> nn.Module:
    """The model as the run predicted with it: with the head beside it where ``described`` says so.

    Args:
        model: the exported timm model.
        folder: where it came from.
        described: the entries under ``mooring`` in its ``config.json``.
    """
    if "front_door" not in described:
        return model
    tensors = load_file(folder / _FILE)
    classes, width = tensors["classifier.weight"].shape[0], tensors["values.weight"].shape[0]
    head = FrontDoorHead(width, classes, **described["front_door"])
    head.load_state_dict(tensors)
    return FrontDoorModel(model, head, str(described["predict"]))
