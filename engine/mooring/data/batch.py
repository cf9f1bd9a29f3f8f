"""What travels from a data source to a method, and what a data source promises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Images of one step with their labels and manifest ids.

    Attributes:
        images: [B, 3, H, W] float32, channels_last, normalised with the model's mean and std.
        labels: [B] int64; -1 is a padding row that no loss and no metric counts.
        ids: [B] int64, row in the manifest; -1 on padding rows. The same image has the same id in
            every run, rank and loader.
        views: further augmented views of the same images, name -> [B, 3, H, W].
        targets: [B, C] float32 soft targets where images were mixed (mixup, cutmix); padding rows are zero.
        source: images of the task the weights were trained for, with labels of that task; None: none this step.
        mean_rows: [] float32, valid rows of all ranks' batches of this step over the number of ranks; None: this
            process is alone.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    views: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Tensor | None = None
    source: Batch | None = None
    mean_rows: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; copies nothing when it is there already."""
        return Batch(
            self.images.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.ids.to(device, non_blocking=True),
            {name: view.to(device, non_blocking=True) for name, view in self.views.items()},
            None if self.targets is None else self.targets.to(device, non_blocking=True),
            None if self.source is None else self.source.to(device),
            None if self.mean_rows is None else self.mean_rows.to(device, non_blocking=True),
        )


def named_views(views: Iterable[Tensor]) -> dict[str, Tensor]:
    """Further views under the names they have in ``Batch.views``: view1, view2, ..."""
    return {f"view{number}": view for number, view in enumerate(views, start=1)}


@runtime_checkable
class DataSource(Protocol):
    """A stream of batches, one epoch per ``iter()``.

    ``iter(source)`` yields the rest of the current epoch; after it is exhausted the next ``iter``
    starts the next epoch. ``state_dict`` is valid between any two batches: a fresh source that
    loads it yields exactly the batches (pixels, labels, ids) that were still to come.
    """

    @property
    def epoch(self) -> int:
        """Index of the epoch that the next batch belongs to."""
        ...

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
