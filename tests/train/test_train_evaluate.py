from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mooring.data.batch import Batch
from mooring.errors import DataError
from mooring.train.evaluate import evaluate, predict

CLASSES = 7


def rows(n: int = 53, seed: int = 0, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Logits with a bias towards the right class, labels without class 5."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    labels[labels == 5] = 1
    logits = torch.randn(n, classes, generator=generator) + 1.5 * F.one_hot(labels, classes)
    return logits, labels


def batches(logits: Tensor, labels: Tensor, sizes: list[int], pad_last: int = 0) -> Iterator[Batch]:
    """The "images" are the logits themselves, so that prediction is reshaping."""
    ids = torch.arange(len(labels)) * 3 + 1
    parts = zip(logits.split(sizes), labels.split(sizes), ids.split(sizes), strict=True)
    for i, (x, y, number) in enumerate(parts):
        if pad_last and i == len(sizes) - 1:
            x = torch.cat([x, torch.full((pad_last, x.shape[1]), 9.0)])
            y, number = (F.pad(t, (0, pad_last), value=-1) for t in (y, number))
        yield Batch(x[:, :, None, None], y, number)


def as_logits(images: Tensor) -> Tensor:
    return images[:, :, 0, 0]


def by_hand(logits: Tensor, labels: Tensor) -> dict[str, float]:
    classes = logits.shape[1]
    p = logits.double().softmax(1)
    confidence, predicted = p.max(1)
    right = predicted == labels
    ranks = (p > p.gather(1, labels[:, None])).sum(1)
    recalls = [right[labels == c].double().mean() for c in range(classes) if (labels == c).any()]
    ece = 0.0
    for lower in range(15):
        inside = (confidence > lower / 15) & (confidence <= (lower + 1) / 15)
        if inside.any():
            gap = right[inside].double().mean() - confidence[inside].mean()
            ece += float(inside.double().mean() * gap.abs())
    return {
        "top1": float(right.double().mean()),
        "top5": float((ranks < min(5, classes)).double().mean()),
        "mean_per_class": float(torch.stack(recalls).mean()),
        "ece": ece,
        "nll": float(F.cross_entropy(logits.double(), labels)),
    }


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("sizes", [[53], [20, 20, 13], [1] * 53])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_metrics_by_their_definitions(sizes: list[int], pad: int, classes: int) -> None:
    logits, labels = rows(classes=classes)
    result = evaluate(as_logits, batches(logits, labels, sizes, pad), classes, "cpu")
    expected = by_hand(logits, labels)
    assert result.scalars() == pytest.approx(expected, abs=1e-6)
    assert result.n == 53
    counted = torch.zeros(classes, classes, dtype=torch.int64)
    for label, predicted in zip(labels.tolist(), logits.argmax(1).tolist(), strict=True):
        counted[label, predicted] += 1
    assert torch.equal(result.confusion, counted)


def test_a_class_that_never_occurs_is_not_averaged_in() -> None:
    """Predicted but absent: torchmetrics' macro average would count it as 0."""
    logits = torch.eye(3)[[0, 2]] * 5
    result = evaluate(as_logits, batches(logits, torch.tensor([0, 1]), [2]), 3, "cpu")
    assert result.mean_per_class == 0.5 and result.top1 == 0.5


def test_the_graph_and_the_state_are_left_alone() -> None:
    logits, labels = rows()
    weight = torch.nn.Parameter(torch.eye(CLASSES))

    cached: list[Tensor] = []

    def predict_fn(images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        cached.append(torch.arange(CLASSES) / 1.0)  # as position caches do
        return as_logits(images) @ weight

    rng = torch.get_rng_state()
    result = evaluate(predict_fn, batches(logits, labels, [50, 3]), CLASSES, "cpu")
    (weight * cached[0]).sum().backward()
    assert torch.equal(weight.grad, cached[0].expand(CLASSES, CLASSES)) and torch.equal(
        rng, torch.get_rng_state()
    )
    assert result.top1 == pytest.approx(by_hand(logits, labels)["top1"])
    with pytest.raises(AttributeError):
        result.top1 = 1.0  # type: ignore[misc]


def test_autocast_reaches_the_model_and_metrics_stay_fp32() -> None:
    logits, labels = rows()
    seen = []

    def predict_fn(images: Tensor) -> Tensor:
        out = as_logits(images) @ torch.eye(CLASSES)
        seen.append(out.dtype)
        return out

    result = evaluate(
        predict_fn,
        batches(logits, labels, [53]),
        CLASSES,
        "cpu",
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )
    assert seen == [torch.bfloat16]
    assert result.scalars() == pytest.approx(by_hand(logits.bfloat16().float(), labels), abs=1e-6)


def test_predictions_leave_out_padding_and_keep_the_order() -> None:
    logits, labels = rows()
    labels[7] = -1  # an image whose label is unknown: predicted, not counted
    result = evaluate(as_logits, batches(logits, labels, [40, 13], 3), CLASSES, "cpu", predictions=True)
    alone = predict(as_logits, batches(logits, labels, [40, 13], 3), CLASSES, "cpu")
    assert result.n == 52 and result.predictions is not None
    for found in (result.predictions, alone):
        assert torch.equal(found.ids, torch.arange(53) * 3 + 1) and torch.equal(found.labels, labels)
        torch.testing.assert_close(found.probabilities, logits.softmax(1), rtol=1e-6, atol=1e-7)


def test_nothing_to_predict() -> None:
    found = predict(as_logits, iter([]), CLASSES, "cpu")
    assert found.probabilities.shape == (0, CLASSES) and len(found.ids) == 0


def test_no_labelled_row_is_an_error() -> None:
    logits, _ = rows(4)
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate(as_logits, batches(logits, torch.full((4,), -1), [4]), CLASSES, "cpu")


def test_a_label_beyond_the_classes_is_an_error() -> None:
    logits, labels = rows(4)
    labels[2] = CLASSES
    with pytest.raises(DataError, match="below 7"):
        evaluate(as_logits, batches(logits, labels, [4]), CLASSES, "cpu")
