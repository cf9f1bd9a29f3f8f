"""Writes a fine-tuned model as a folder that timm's ``create_model("local-dir:FOLDER")`` opens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mooring.errors import RunFolderError, WeightsError
from mooring.models.encoder import Encoder
from mooring.models.torchvision_shim import import_timm
from mooring.syncing import make_folder, replace_durably

timm = import_timm()

# where the weights once came from, and what described the source's labels and test-time recipe
_DROPPED = (
    "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "tag", "custom_load",
    "architecture",
    "label_offset", "label_names", "label_descriptions", "test_input_size", "test_crop_pct", "test_pool_size",
)  # fmt: skip
_DATA_KEYS = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


def export(
    encoder: Encoder,
    head: nn.Linear,
    folder: str | Path,
    classes: Sequence[str],
    data_config: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes ``config.json`` and ``model.safetensors`` and leaves ``encoder`` and ``head`` as they are.

    The classifier is put where timm's architecture has its own, and the assembled model is compared with
    ``head(encoder(x))`` on random images before anything is written.

    Args:
        encoder: from ``build_encoder``.
        head: weight [C, D].
        folder: created where missing; the two files are replaced one by one, each whole.
        classes: C label names, in logit order.
        data_config: how images are prepared; overrides the encoder's own entries.
        extra: further JSON-able facts, kept under ``mooring`` in ``config.json``.

    Returns:
        ``folder``.

    Raises:
        WeightsError: the architecture cannot hold this classifier with the same logits.
        RunFolderError: the folder cannot be written.
    """
    if len(classes) != head.out_features:
        raise ValueError(f"the head has {head.out_features} classes; got {len(classes)} class names")
    config = {**encoder.data_config, **(data_config or {})}
    if encoder.fixed_input_size:
        config["input_size"] = encoder.data_config["input_size"]  # the weights fit no other size
    full = assemble(encoder, head)

    described = {key: value for key, value in encoder.pretrained_cfg.items() if key not in _DROPPED}
    described |= {key: config[key] for key in _DATA_KEYS if key in config}
    described |= {"num_classes": len(classes), "custom_load": False}
    document: dict[str, Any] = {
        "architecture": encoder.architecture,
        "num_classes": len(classes),
        "num_features": encoder.feature_dim,
        "label_names": list(classes),
        "pretrained_cfg": described,
    }
    if encoder.model_args:
        document["model_args"] = encoder.model_args
    if extra:
        document["mooring"] = dict(extra)
    _write(Path(folder), document, full)
    return Path(folder)


def assemble(encoder: Encoder, head: nn.Linear) -> nn.Module:
    """The whole timm model in eval mode: a copy of the encoder's weights, and the head as its classifier.

    Also the way to learn before a run whether its result can be exported.

    Raises:
        WeightsError: the assembled model does not give the logits of ``head(encoder(x))``.
    """
    with torch.random.fork_rng(devices=[]):  # building draws random weights; the run must not notice
        full: Any = timm.create_model(
            encoder.architecture, pretrained=False, num_classes=head.out_features, **encoder.model_args
        )
    result = full.load_state_dict(encoder.model.state_dict(), strict=False)
    _check_names(encoder, result.unexpected_keys)
    _set_classifiers(encoder, full, head)
    full.to(head.weight.device).eval()
    _verify_logits(encoder, head, full)
    return full


def check_assembly(encoder: Encoder, head: nn.Linear) -> None:
    """What ``assemble`` can tell without the encoder's weights: names of parameters and the classifier's place.

    Raises:
        WeightsError: the assembled model does not have the encoder's parameters, or no place for the head.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        full: Any = timm.create_model(
            encoder.architecture, pretrained=False, num_classes=head.out_features, **encoder.model_args
        )
        placeholder = nn.Linear(head.in_features, head.out_features)
    _check_names(encoder, set(encoder.model.state_dict()) - set(full.state_dict()))
    _set_classifiers(encoder, full, placeholder)


def _check_names(encoder: Encoder, unexpected: Iterable[str]) -> None:
    if names := sorted(unexpected):
        raise WeightsError(
            f"{encoder.architecture} cannot be exported: timm's architecture does not have the encoder's "
            f"{', '.join(names)}"
        )


def _set_classifiers(encoder: Encoder, full: Any, head: nn.Linear) -> None:
    classifiers = full.get_classifier()
    for classifier in classifiers if isinstance(classifiers, tuple | list) else (classifiers,):
        _set_classifier(encoder.architecture, classifier, head)


@torch.no_grad()
def _set_classifier(architecture: str, classifier: nn.Module, head: nn.Linear) -> None:
    weight, bias = getattr(classifier, "weight", None), getattr(classifier, "bias", None)
    if not isinstance(weight, Tensor) or weight.numel() != head.weight.numel():
        shape = list(weight.shape) if isinstance(weight, Tensor) else "no weight"
        raise WeightsError(
            f"{architecture} cannot be exported: its classifier is a {type(classifier).__name__} with "
            f"{shape}; expected one that takes a weight of {list(head.weight.shape)}"
        )
    weight.copy_(head.weight.reshape(weight.shape))  # a classifier may be a 1x1 convolution
    if isinstance(bias, Tensor):
        bias.copy_(head.bias) if head.bias is not None else bias.zero_()
    elif head.bias is not None and (head.bias.is_meta or bool((head.bias != 0).any())):
        raise WeightsError(
            f"{architecture} cannot be exported: its classifier has no bias, the trained head has one"
        )


@torch.no_grad()
def _verify_logits(encoder: Encoder, head: nn.Linear, full: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *encoder.data_config["input_size"], generator=generator).to(head.weight.device)
    training = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        expected = head(encoder(images)).float()
    finally:
        for module, mode in training.items():
            module.training = mode
    got = full(images).float()
    # Same weights, same operations up to the classifier: only its rounding may differ.
    error = (got - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    if not bool(error < 1e-4):
        raise WeightsError(
            f"{encoder.architecture} cannot be exported: timm's own classifier on these features gives other "
            f"logits (relative difference {float(error):.1e}): something lies between the features and it"
        )


def _write(folder: Path, document: dict[str, Any], full: nn.Module) -> None:
    # clone: safetensors refuses tensors that share memory
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in full.state_dict().items()}
    try:
        make_folder(folder)
        partial = folder / "model.safetensors.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        replace_durably(partial, folder / "model.safetensors")
        partial = folder / "config.json.partial"
        partial.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        replace_durably(partial, folder / "config.json")
    except OSError as err:
        raise RunFolderError(
            f"the model cannot be written to {folder} ({err}): free space or choose another out"
        ) from err
