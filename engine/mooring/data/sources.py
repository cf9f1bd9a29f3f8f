"""Which source makes the batches."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal

import torch

from mooring.data.augment import Augmentation
from mooring.data.manifest import Split
from mooring.data.source import EpochSource
from mooring.errors import DataError

SourceKind = Literal["auto", "dali", "torch"]


def dali_is_installed() -> bool:
    """Whether DALI can be imported, without importing it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # there is no package nvidia at all
        return False


def make_source(
    kind: SourceKind,
    split: Split,
    augment: Augmentation,
    *,
    batch_size: int,
    training: bool,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 1,
    views: Sequence[Augmentation] = (),
    device: torch.device | str = "cpu",
    drop_last: bool | None = None,
    interleaved: bool = False,
) -> EpochSource:
    """A source by name; ``auto`` takes DALI where it is installed, else torch. Arguments as ``EpochSource``.

    Raises:
        DataError: no such kind, or the arguments do not fit the data.
        MissingDependencyError: DALI was asked for by name and is not installed.
    """
    if kind == "auto":
        kind = "dali" if dali_is_installed() else "torch"
    if kind not in ("dali", "torch"):
        raise DataError(f"expected a data source auto, dali or torch; got {kind!r}")
    source: type[EpochSource]
    if kind == "dali":
        from mooring.data.dali_source import DaliSource

        source = DaliSource
    else:
        from mooring.data.torch_source import TorchSource

        source = TorchSource
    return source(
        split,
        augment,
        batch_size=batch_size,
        training=training,
        seed=seed,
        rank=rank,
        world=world,
        workers=workers,
        views=views,
        device=device,
        drop_last=drop_last,
        interleaved=interleaved,
    )
