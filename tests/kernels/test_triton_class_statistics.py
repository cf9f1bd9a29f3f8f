"""Triton class statistics against a per-class loop in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from mooring_kernels.class_statistics.gpu import class_logits_fwd_kernel, class_statistics_fwd


def loop(
    frozen: Tensor, tuned: Tensor, labels: Tensor, head_weight: Tensor, cga_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    frozen, tuned, head_weight = frozen.double(), tuned.double(), head_weight.double()
    frozen_mean = torch.zeros_like(head_weight)
    tuned_mean = torch.zeros_like(head_weight)
    count = torch.zeros_like(head_weight[:, 0])
    for c in range(head_weight.shape[0]):
        members = labels == c
        if not members.any():
            continue
        prototype = head_weight[c] / head_weight[c].norm().clamp_min(1e-12)
        weight = torch.softmax(cga_scale * (tuned[members] @ prototype), dim=0)
        frozen_mean[c] = frozen[members].mean(0)
        tuned_mean[c] = weight @ tuned[members]
        count[c] = members.sum()
    return frozen_mean, tuned_mean, count


def draw_bank(
    rows: int, width: int, classes: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit rows of a bank, labels with masked rows among them, and a head."""
    frozen, tuned = (
        torch.nn.functional.normalize(torch.randn(rows, width, generator=generator)).to(device, dtype)
        for _ in range(2)
    )
    labels = torch.randint(-1, classes + 1, (rows,), generator=generator).to(device)  # -1 and C are masked
    head_weight = 0.01 * torch.randn(classes, width, generator=generator).to(device)
    return frozen, tuned, labels, head_weight


@pytest.mark.parametrize("cga_scale", [1.0, 50.0], ids=["code", "sharp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (13, 17, 9), (97, 130, 3), (40, 65, 25)], ids="K{0[0]}-D{0[1]}-C{0[2]}".format
)
def test_means_and_counts(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    cga_scale: float,
    device: torch.device,
    generator: torch.Generator,
    guarded_empty: None,
    assert_within: Any,
) -> None:
    bank = draw_bank(*shape, dtype, device, generator)
    actual = class_statistics_fwd(*bank, cga_scale)
    expected = loop(*bank, cga_scale)
    rows, width, _ = shape
    # t rounds with a relative error of the width's root, and its error times cga_scale enters the weight.
    operations = cga_scale * (width**0.5 + 8) + rows**0.5 + 8
    assert_within(actual[0], expected[0], operations=rows**0.5 + 8)
    assert_within(actual[1], expected[1], operations=operations)
    assert torch.equal(actual[2].double(), expected[2])
    assert all(result.dtype == torch.float32 for result in actual)


def test_masked_rows_are_not_read_and_absent_classes_are_zero(
    device: torch.device, generator: torch.Generator
) -> None:
    frozen, tuned, _, head_weight = draw_bank(6, 20, 4, torch.float32, device, generator)
    labels = torch.tensor([2, -1, 2, 4, 0, -7], device=device)
    clean = class_statistics_fwd(frozen, tuned, labels, head_weight, 1.0)
    for row in (1, 3, 5):
        frozen[row] = tuned[row] = float("nan")
    dirty = class_statistics_fwd(frozen, tuned, labels, head_weight, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert dirty[2].tolist() == [1.0, 0.0, 2.0, 0.0]
    assert not dirty[0][[1, 3]].any() and not dirty[1][[1, 3]].any()
    assert torch.equal(dirty[1][0], tuned[4]), "one member: its mean is the row itself"


def test_a_label_equal_to_c_reads_no_prototype(device: torch.device, generator: torch.Generator) -> None:
    """Nor does its row enter a mean: the confidence kernel stores 0 for it and reads nothing behind the head."""
    _, tuned, _, head_weight = draw_bank(4, 16, 3, torch.float32, device, generator)
    behind = torch.full((5, 16), float("nan"), device=device)
    behind[:3] = head_weight
    labels = torch.tensor([3, 4, 0, 3], device=device)
    logits = torch.full((4,), float("nan"), device=device)
    class_logits_fwd_kernel[(1,)](
        tuned, labels, behind, logits, 4, 1.0, 1e-12,
        C=3, D=16, stride_tuned_k=16, stride_tuned_d=1, stride_labels_k=1,
        stride_head_weight_c=16, stride_head_weight_d=1, BLOCK_K=4, BLOCK_D=16,
    )  # fmt: skip
    assert logits[[0, 1, 3]].tolist() == [0.0, 0.0, 0.0]
    assert logits[2].isfinite() and logits[2] != 0


def test_everything_masked(device: torch.device, generator: torch.Generator) -> None:
    frozen, tuned, labels, head_weight = draw_bank(5, 8, 3, torch.float32, device, generator)
    for result in class_statistics_fwd(frozen, tuned, torch.full_like(labels, -1), head_weight, 1.0):
        assert not result.any() and not result.isnan().any()
    empty = class_statistics_fwd(frozen[:0], tuned[:0], labels[:0], head_weight, 1.0)
    assert all(not result.any() for result in empty)


def test_confidence_logits_too_large_for_exp_stay_finite(device: torch.device, assert_within: Any) -> None:
    tuned = torch.eye(4, device=device)[:3] * torch.tensor([[1.0], [2.0], [3.0]], device=device)
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    head_weight = torch.ones(1, 4, device=device)
    actual = class_statistics_fwd(tuned, tuned, labels, head_weight, 1e4)[1]
    assert_within(actual, loop(tuned, tuned, labels, head_weight, 1e4)[1], operations=32, magnitude=3.0)


def test_zero_prototype_gives_the_plain_mean(
    device: torch.device, generator: torch.Generator, assert_within: Any
) -> None:
    frozen, tuned, labels, head_weight = draw_bank(12, 9, 2, torch.float32, device, generator)
    actual = class_statistics_fwd(frozen, tuned, labels, torch.zeros_like(head_weight), 1.0)[1]
    for c in range(2):
        assert_within(actual[c], tuned[labels == c].double().mean(0), operations=16)


def test_result_is_the_same_every_time(device: torch.device, generator: torch.Generator) -> None:
    bank = draw_bank(60, 33, 5, torch.float32, device, generator)
    first, second = class_statistics_fwd(*bank, 1.0), class_statistics_fwd(*bank, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided_bank(device: torch.device, generator: torch.Generator) -> None:
    frozen, tuned, labels, head_weight = draw_bank(11, 24, 3, torch.float32, device, generator)
    dense = class_statistics_fwd(
        frozen[:, ::2].contiguous(), tuned[:, 12:].contiguous(), labels, head_weight[:, :12], 1.0
    )
    strided = class_statistics_fwd(frozen[:, ::2], tuned[:, 12:], labels, head_weight[:, :12], 1.0)
    assert all(torch.equal(a, b) for a, b in zip(dense, strided, strict=True))
