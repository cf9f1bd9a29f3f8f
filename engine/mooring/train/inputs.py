"""What a run reads beside its own images, by content: where it lies is no matter, that it is the same is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mooring.config.schema import RunConfig
from mooring.data.manifest import Split
from mooring.data.source import EpochSource
from mooring.models.encoder import Encoder, weights_file
from mooring.regular_file import open_regular
from mooring.train.held_out import HeldOut

# Settings that say where such an input lies; ``method.`` stands for each method of a combination.
PATHS = frozenset({
    "data.path", "model.weights", "method.source_data", "method.source_classes", "method.text", "method.class_names",
})  # fmt: skip
# Only measured on: a run may get or lose one without training differently.
MEASURED = ("report.", "data.extra_test.")


def weights_digest(config: RunConfig, encoder: Encoder) -> str:
    """sha256 of the file of the pretrained weights; of the tensors, where timm has them; ``none`` for random ones.

    Args:
        config: of the run.
        encoder: as it was just loaded.
    """
    model = config.model
    file = weights_file(model.name, model.weights, None)
    if file is not None:
        facts = file.stat()
        return _file_digest(
            file.resolve(), (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        )
    return "none" if model.weights == "none" else tensors_digest(encoder.state_dict())


@cache
def _file_digest(file: Path, facts: tuple[int, ...]) -> str:
    """Once for a file that is as it was: the change time (ctime) cannot be set."""
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and every byte."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def images_of(
    source_images: Split | None, held_out: HeldOut | None, extra: Mapping[str, Split]
) -> dict[str, str]:
    """Digest of each further set of images, under the setting that names it; a set that is not there has none."""
    found = {} if source_images is None else {"method.source_data": source_images.digest}
    measured: dict[str, EpochSource | None] = {}
    if held_out is not None:
        measured = {"report.unseen": held_out.unseen, "report.source": held_out.source}
    found |= {name: source.split.digest for name, source in measured.items() if source is not None}
    return found | {f"data.extra_test.{name}": rows.digest for name, rows in extra.items()}
