"""How good a classifier is: accuracy, accuracy per class, calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mooring.collectives import all_reduce_
from mooring.data.batch import Batch
from mooring.distributed import Ranks
from mooring.errors import DataError
from mooring.models.torchvision_shim import import_torchvision

ECE_BINS = 15


@dataclass(frozen=True, slots=True)
class Predictions:
    """Class probabilities per image, on the CPU, in the order they came.

    Attributes:
        ids: [n] int64 manifest rows.
        labels: [n] int64; -1 where unknown.
        probabilities: [n, C] float32.
    """

    ids: Tensor
    labels: Tensor
    probabilities: Tensor


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Metrics over n labelled images. Shares lie in [0, 1].

    Attributes:
        top1: share with the right class first.
        top5: share with the right class among the first min(5, C).
        mean_per_class: mean over the classes that occur of the share that is right.
        ece: expected calibration error of the top probability, 15 bins of equal width, L1.
        nll: mean negative log-likelihood, in nats.
        n: images counted.
        confusion: [C, C] int64 on the CPU, row = true class, column = predicted.
        predictions: what was predicted for each image, where asked for.
    """

    top1: float
    top5: float
    mean_per_class: float
    ece: float
    nll: float
    n: int
    confusion: Tensor
    predictions: Predictions | None = None

    def scalars(self) -> dict[str, float]:
        """The single numbers, by name."""
        names = ("top1", "top5", "mean_per_class", "ece", "nll")
        return {name: getattr(self, name) for name in names}


Autocast = Callable[[], AbstractContextManager[object]]


# no_grad, not inference_mode: a tensor that the model or the source caches here must stay usable in training
@torch.no_grad()
def evaluate(
    predict_fn: Callable[[Tensor], Tensor],
    source: Iterable[Batch],
    num_classes: int,
    device: torch.device | str,
    autocast: Autocast = nullcontext,
    *,
    predictions: bool = False,
    ranks: Ranks | None = None,
) -> EvalResult:
    """Runs a classifier over a source and measures it. Switching to eval mode is the caller's part.

    Rows with label -1 count nowhere. Logits are taken to fp32 before anything is computed. Counts stay on
    the device until the end. Over several ranks each brings its share of the rows, and every rank gets the result
    for all of them: the same numbers, those of a single process but for the order in which sums are rounded.

    Args:
        predict_fn: images [B, 3, H, W] -> logits [B, C].
        source: batches; the last may be shorter or padded.
        num_classes: C >= 2.
        device: where to compute.
        autocast: context factory of the run's precision.
        predictions: also return the probabilities per image, of this rank's rows.
        ranks: those that share the rows; None: this process has them all.

    Raises:
        DataError: a label is not below C, or no row has a label.
    """
    import_torchvision()  # torchmetrics imports it
    from torchmetrics.classification import (
        MulticlassAccuracy,
        MulticlassCalibrationError,
        MulticlassConfusionMatrix,
    )

    device = torch.device(device)
    ranks = ranks or Ranks()
    # what it would check is checked below; ranks are brought together below, in one place
    checked = {"num_classes": num_classes, "validate_args": False, "sync_on_compute": False}
    top5 = MulticlassAccuracy(top_k=min(5, num_classes), average="micro", **checked).to(device)
    calibration = MulticlassCalibrationError(n_bins=ECE_BINS, norm="l1", **checked).to(device)
    confusion = MulticlassConfusionMatrix(**checked).to(device)
    nll = torch.zeros((), dtype=torch.float64, device=device)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    n = 0
    problem: DataError | None = (
        None  # raised by all ranks together: one that stopped alone would leave them waiting
    )
    for batch, logits in _forward(predict_fn, source, device, autocast):
        if predictions:
            rows.append(_row(batch, logits))
        kept = batch.labels >= 0
        labels, logits = batch.labels[kept], logits[kept]
        n += len(labels)
        if not len(labels):
            continue
        if problem is None and int(labels.max()) >= num_classes:
            problem = DataError(
                f"labels must be below {num_classes}, the classes of the model; got {int(labels.max())}: "
                "the data set has other classes than the one the model was trained on"
            )
        if problem is not None:
            continue
        probabilities = logits.softmax(1)
        nll += F.cross_entropy(logits, labels, reduction="sum")
        top5.update(probabilities, labels)
        calibration.update(probabilities, labels)
        # from the logits: two probabilities may round to the same number
        confusion.update(logits.argmax(1), labels)

    ranks.agree(problem)
    if ranks.world > 1:
        n = sum(ranks.gather(n))
        for metric in (top5, confusion):
            for name in metric._defaults:
                all_reduce_(getattr(metric, name), ranks, "evaluation")
        all_reduce_(nll, ranks, "evaluation")
        # two numbers per row, which the calibration error sums by bin
        for name in ("confidences", "accuracies"):
            parts = ranks.gather([part.cpu() for part in getattr(calibration, name)])
            setattr(calibration, name, [part.to(device) for rank in parts for part in rank])
    if n == 0:
        raise DataError("nothing to evaluate: no row has a label")
    counts = confusion.compute().cpu()
    per_class = counts.sum(1)
    right = counts.diagonal()
    occurs = per_class > 0
    return EvalResult(
        top1=int(right.sum()) / n,
        top5=float(top5.compute()),
        mean_per_class=float((right[occurs].double() / per_class[occurs].double()).mean()),
        ece=float(calibration.compute()),
        nll=float(nll) / n,
        n=n,
        confusion=counts,
        predictions=_gathered(rows, num_classes) if predictions else None,
    )


@torch.no_grad()
def predict(
    predict_fn: Callable[[Tensor], Tensor],
    source: Iterable[Batch],
    num_classes: int,
    device: torch.device | str,
    autocast: Autocast = nullcontext,
) -> Predictions:
    """Class probabilities for every image of a source, labelled or not; padding rows (id -1) are left out."""
    return _gathered(
        [_row(*pair) for pair in _forward(predict_fn, source, torch.device(device), autocast)], num_classes
    )


def _forward(
    predict_fn: Callable[[Tensor], Tensor], source: Iterable[Batch], device: torch.device, autocast: Autocast
) -> Iterable[tuple[Batch, Tensor]]:
    for batch in source:
        on_device = batch.to(device)
        with autocast():
            logits = predict_fn(on_device.images)
        yield on_device, logits.float()


def _row(batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    real = batch.ids >= 0
    return batch.ids[real].cpu(), batch.labels[real].cpu(), logits[real].softmax(1).cpu()


def _gathered(rows: list[tuple[Tensor, Tensor, Tensor]], num_classes: int) -> Predictions:
    if not rows:
        none = torch.empty(0, dtype=torch.int64)
        return Predictions(none, none.clone(), torch.empty(0, num_classes))
    ids, labels, probabilities = zip(*rows, strict=True)
    return Predictions(torch.cat(ids), torch.cat(labels), torch.cat(probabilities))
