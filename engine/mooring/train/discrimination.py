"""General discrimination: what an encoder still tells apart beyond the classes it is tuned on."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mooring.data.batch import Batch
from mooring.report.discrimination import nearest_mean_accuracy, recall_at_1
from mooring.train.evaluate import Autocast, evaluate

SHOTS = 5  # images in a class mean


@dataclass(frozen=True, slots=True)
class Discrimination:
    """Shares in [0, 1]; None where not asked.

    Attributes:
        recall_at_1: of images of the held-out classes, the nearest other image is of the same class.
        nearest_mean: they lie nearest to the mean of a few images of their class.
        source_top1: the source head is right about images of the source task.
        n: images of the held-out classes.
    """

    recall_at_1: float | None
    nearest_mean: float | None
    source_top1: float | None
    n: int

    def scalars(self) -> dict[str, float]:
        """The single numbers that were asked for, under the names they are reported with."""
        named = {
            "unseen_recall_at_1": self.recall_at_1,
            "unseen_nearest_mean": self.nearest_mean,
            "source_top1": self.source_top1,
        }
        return {name: value for name, value in named.items() if value is not None}


def measure_discrimination(
    encoder: nn.Module,
    held_out: Iterable[Batch] | None,
    *,
    source: Iterable[Batch] | None = None,
    source_head: nn.Module | None = None,
    shots: int = SHOTS,
    draws: int = 10,
    seed: int = 0,
    device: torch.device | str = "cpu",
    autocast: Autocast = nullcontext,
) -> Discrimination:
    """GD and SD of spec 3(f), to be logged beside the accuracy on the classes that are tuned on.

    Split the classes of a data set into seen and unseen ones, tune on the seen, and give the unseen here. The encoder
    is measured in eval mode, with its own buffers for source images too, and left in the mode it was in.

    Args:
        encoder: images to features [B, D].
        held_out: images of classes that it was not tuned on, test-time preprocessing; None: GD is not asked for.
        source: images of the source task (``mooring.data.source_task.source_split(..., split="val")``).
        source_head: features to logits of the source task: ``method.source_head``, or ``pretrained_head`` where
            the method keeps none.
        shots, draws, seed: of ``nearest_mean_accuracy``.
        device, autocast: of the run.

    Raises:
        ValueError: images or classes are too few, one of source and source_head is missing, or nothing is asked for.
    """
    if held_out is None and source is None:
        raise ValueError("measure_discrimination: expected held_out or source; got neither")
    if (source is None) != (source_head is None):
        raise ValueError("measure_discrimination: expected source and source_head, or neither")
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        found = None if held_out is None else _features(encoder, held_out, device, autocast)
        top1 = None
        if source is not None and source_head is not None:
            head = source_head
            classes = _width(head)
            top1 = evaluate(
                lambda images: head(encoder(images)), source, classes, device=device, autocast=autocast
            ).top1
    finally:
        for module, training in modes:  # one by one: a part may be pinned to a mode of its own
            module.training = training
    if found is None:
        return Discrimination(None, None, top1, 0)
    features, labels = found
    return Discrimination(
        recall_at_1=recall_at_1(features, labels),
        nearest_mean=nearest_mean_accuracy(features, labels, shots=shots, draws=draws, seed=seed),
        source_top1=top1,
        n=int((labels >= 0).sum()),
    )


def _width(head: nn.Module) -> int:
    out = getattr(head, "out_features", None)
    if not isinstance(out, int):
        raise ValueError(
            f"measure_discrimination: expected a Linear as source_head; got {type(head).__name__}"
        )
    return out


@torch.no_grad()
def _features(
    encoder: nn.Module, batches: Iterable[Batch], device: torch.device | str, autocast: Autocast
) -> tuple[Tensor, Tensor]:
    features, labels = [], []
    for batch in batches:
        with autocast():
            features.append(encoder(batch.images.to(device)).float())
        labels.append(batch.labels.to(device))
    if not features:
        raise ValueError("measure_discrimination: expected images of held-out classes; got none")
    return torch.cat(features), torch.cat(labels)
