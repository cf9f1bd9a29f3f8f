"""General discrimination against definitions written image by image."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mooring.data.batch import Batch
from mooring.report import discrimination
from mooring.report.discrimination import nearest_mean_accuracy, recall_at_1
from mooring.train.discrimination import measure_discrimination


def clouds(classes: int = 4, each: int = 9, spread: float = 1.2) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat(each)
    return torch.randn(classes, 6, generator=g)[labels] + spread * torch.randn(
        len(labels), 6, generator=g
    ), labels


def slow_recall(features: torch.Tensor, labels: torch.Tensor) -> float:
    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    right = asked = 0
    for i, own in enumerate(labels.tolist()):
        others = [j for j in range(len(labels)) if j != i and labels[j] >= 0]
        if own < 0 or not any(labels[j] == own for j in others):
            continue
        asked += 1
        right += labels[max(others, key=lambda j: cosine(features[i].double(), features[j].double()))] == own
    return float(right) / asked


@pytest.mark.parametrize("chunk", [1024, 5])
def test_recall_is_the_nearest_other_image(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(discrimination, "_CHUNK", chunk)
    features, labels = clouds()
    labels[3], labels[7] = -1, 9  # a padding row, and a class of one image
    got = recall_at_1(features, labels)
    assert 0.3 < got < 1
    assert got == pytest.approx(slow_recall(features, labels))
    assert recall_at_1(features * 100, labels) == got  # the length of a row does not count


def test_nearest_mean_counts_images_outside_the_support_only() -> None:
    features, labels = clouds(spread=0.01)
    assert nearest_mean_accuracy(features, labels) == 1
    noise = torch.randn(4000, 6, generator=torch.Generator().manual_seed(1))
    chance = nearest_mean_accuracy(noise, torch.arange(4).repeat(1000))
    assert chance == pytest.approx(0.25, abs=0.03)  # support images would count as right
    # one shot, two images each: the support is one image, and the other is asked about
    rows = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.1, 1.0]])
    assert nearest_mean_accuracy(rows, torch.tensor([5, 5, 2, 2]), shots=1) == 1
    features, labels = clouds()
    assert nearest_mean_accuracy(features, labels, seed=1) == nearest_mean_accuracy(features, labels, seed=1)


def test_too_few_images_are_an_error() -> None:
    features, labels = clouds(each=5)
    with pytest.raises(ValueError, match="more than 5 images"):
        nearest_mean_accuracy(features, labels)
    with pytest.raises(ValueError, match="two images"):
        recall_at_1(features[:4], labels[:4])
    with pytest.raises(ValueError, match=r"features \[N, D\]"):
        recall_at_1(features, labels[:3])


def test_an_encoder_is_measured_in_eval_mode_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    encoder = nn.Sequential(norm, nn.Flatten(), nn.Linear(12, 6), nn.Dropout(0.5)).train()
    encoder[1].eval()
    head = nn.Linear(6, 3)
    images = torch.randn(24, 3, 2, 2)
    labels = torch.arange(3).repeat(8)
    batches = [Batch(images[i : i + 6], labels[i : i + 6], torch.arange(i, i + 6)) for i in range(0, 24, 6)]
    padded = [*batches, Batch(images[:1], torch.tensor([-1]), torch.tensor([-1]))]
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    result = measure_discrimination(encoder, padded, source=batches, source_head=head, shots=2)
    assert [m.training for m in encoder.modules()] == [True, True, False, True, True]
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())
    encoder.eval()
    with torch.no_grad():
        features = encoder(images)
        assert result.source_top1 == pytest.approx(
            float((head(features).argmax(1) == labels).double().mean())
        )
    assert result.recall_at_1 == pytest.approx(recall_at_1(features, labels))
    assert result.n == 24
    with pytest.raises(ValueError, match="or neither"):
        measure_discrimination(encoder, batches, source=batches)
    with pytest.raises(ValueError, match="got none"):
        measure_discrimination(encoder, [])
    with pytest.raises(ValueError, match="got neither"):
        measure_discrimination(encoder, None)
    alone = measure_discrimination(encoder, None, source=batches, source_head=head)
    assert alone.scalars() == {"source_top1": result.source_top1} and alone.n == 0
