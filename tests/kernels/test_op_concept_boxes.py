"""concept_boxes: every implementation against a loop, on values whose sums are exact in every order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS, KERNELS
from torch import Tensor

from mooring_kernels import concept_boxes
from mooring_kernels.concept_boxes.rule import default_group_width, default_rank_stride

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(
    shape: tuple[int, int, int, int, int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = False,
) -> Inputs:
    """Small integers: every sum is exact, and ties are many. Labels hold masked ones."""
    batch, width, rows, columns, classes = shape

    def integers(*size: int) -> Tensor:
        return torch.randint(-8, 9, size, generator=generator).to(dtype)

    feature_map = integers(batch, width, rows, columns)
    if channels_last:
        feature_map = feature_map.to(memory_format=torch.channels_last)
    labels = torch.randint(-1, classes + 1, (batch,), generator=generator)
    return feature_map, integers(batch, classes), labels, integers(classes, width)


def loop(
    feature_map: Tensor,
    logits: Tensor,
    labels: Tensor,
    head_weight: Tensor,
    *,
    image_size: tuple[int, int],
    patches: int,
    group_width: int,
    rank_stride: int,
    patch_side: int = 64,
    rivals: int = 3,
    negatives: int = 100,
    peak: str = "corner",
) -> tuple[list[list[list[float]]], list[list[int]]]:
    height, width = image_size
    rows, columns = feature_map.shape[2:]
    classes = head_weight.shape[0]
    boxes, negative_classes = [], []
    for image, y, label in zip(feature_map.double(), logits.double().tolist(), labels.tolist(), strict=True):
        if not 0 <= label < classes:
            left, top = (max(0.0, (size - patch_side) / 2) for size in (width, height))
            box = [left, top, min(left + patch_side, width), min(top + patch_side, height)]
            boxes.append([box] * patches)
            negative_classes.append([-1] * min(negatives, classes - 1))
            continue
        others = sorted((c for c in range(classes) if c != label), key=lambda c: (-y[c], c))
        chosen = others[:rivals]
        weight = head_weight.double()
        score = (len(chosen) * weight[label] - sum(weight[c] for c in chosen)).tolist()
        rank = sorted(range(len(score)), key=lambda d: (-score[d], d))
        found = []
        for j in range(patches):
            group = rank[j * rank_stride : j * rank_stride + group_width]
            response = sum(image[d] for d in group).flatten().tolist()  # type: ignore[union-attr]
            best = response.index(max(response))
            x, y_pixel = (best % columns) * width / columns, (best // columns) * height / rows
            half = patch_side / 2
            if peak == "center":
                left = min(max(x + width / columns / 2 - half, 0), max(width - patch_side, 0))
                top = min(max(y_pixel + height / rows / 2 - half, 0), max(height - patch_side, 0))
                found.append([left, top, min(left + patch_side, width), min(top + patch_side, height)])
            else:
                found.append(
                    [
                        max(0, x - half),
                        max(0, y_pixel - half),
                        min(width, x + half),
                        min(height, y_pixel + half),
                    ]
                )
        boxes.append(found)
        negative_classes.append(others[:negatives])
    return boxes, negative_classes


CASES = {  # shape B, D, H, W, C; options
    "defaults": ((5, 68, 7, 7, 6), {"image_size": (224, 224)}),
    "wide-image": ((4, 70, 2, 5, 9), {"image_size": (64, 160), "patch_side": 40, "negatives": 3}),
    "one-rival": ((4, 19, 3, 3, 2), {"image_size": (96, 96), "patches": 2}),
    "one-class": ((3, 9, 2, 2, 1), {"image_size": (32, 32)}),
    "image-within-patch": ((3, 33, 1, 2, 4), {"image_size": (48, 96), "negatives": 0}),
    "no-rows": ((0, 12, 2, 2, 3), {"image_size": (64, 64)}),
    "groups-touch": (
        (2, 40, 5, 4, 5),
        {"image_size": (80, 64), "patches": 4, "group_width": 10, "rank_stride": 10, "rivals": 5},
    ),
}


@pytest.mark.parametrize("peak", ["corner", "center"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_against_a_loop(
    impl: Any, case: str, dtype: torch.dtype, channels_last: bool, peak: str, generator: torch.Generator
) -> None:
    shape, options = CASES[case]
    if impl == "triton" and dtype == torch.bfloat16 and not channels_last:
        pytest.skip("a launch that differs in nothing that the interpreter sees")
    inputs = draw(shape, generator, dtype, channels_last=channels_last)
    boxes, negative_classes = concept_boxes(*inputs, **options, peak=peak, impl=impl)  # type: ignore[arg-type]
    resolved = {
        "patches": 9,
        "group_width": default_group_width(shape[1]),
        "rank_stride": default_rank_stride(shape[1]),
        **options,
    }
    expected = loop(*inputs, **resolved, peak=peak)  # type: ignore[arg-type]
    assert boxes.shape == (shape[0], resolved["patches"], 4) and boxes.dtype == torch.float32
    assert negative_classes.dtype == torch.int64
    # cells of an image that its map divides are whole pixels: nothing is rounded
    assert boxes.tolist() == expected[0] and negative_classes.tolist() == expected[1]


@pytest.mark.parametrize("impl", KERNELS)
def test_real_numbers_give_the_reference_bit_for_bit(impl: Any, generator: torch.Generator) -> None:
    """Scores are formed in one order everywhere, so the ranks agree; sums that nearly tie are not drawn here."""
    feature_map = torch.randn(3, 96, 5, 6, generator=generator).relu()
    logits, head_weight = torch.randn(3, 7, generator=generator), torch.randn(7, 96, generator=generator)
    inputs = feature_map[:, :, ::2, 1:], logits, torch.tensor([6, 0, 3]), head_weight.T.contiguous().T
    expected = concept_boxes(*inputs, image_size=(100, 70), impl="reference")
    got = concept_boxes(*inputs, image_size=(100, 70), impl=impl)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-4)
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("turned", [False, True], ids=["row", "column"])
def test_a_map_of_one_row_or_column_is_read_by_the_stride_that_counts(
    impl: Any, turned: bool, generator: torch.Generator
) -> None:
    """The stride of a dimension of size 1 may be anything, in a tensor that counts as contiguous too."""
    _, logits, labels, head_weight = draw((3, 12, 1, 4, 5), generator)
    feature_map = torch.randn(3, 12, 1, 4, generator=generator)
    if turned:
        feature_map = feature_map.transpose(2, 3)
    options: dict[str, Any] = {"image_size": (96, 96), "patches": 2, "group_width": 3, "rank_stride": 3}
    for x in (
        feature_map,
        feature_map.as_strided(feature_map.shape, [48, 4, *((1, 77) if turned else (77, 1))]),
    ):
        boxes, _ = concept_boxes(x, logits, labels, head_weight, **options, impl=impl)
        expected, _ = concept_boxes(x.clone(), logits, labels, head_weight, **options, impl="reference")
        assert torch.equal(boxes, expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masked_rows_use_no_features(impl: Any, generator: torch.Generator) -> None:
    feature_map, logits, _, head_weight = draw((4, 20, 3, 3, 4), generator)
    labels = torch.tensor([2, -1, 4, 1])
    expected = concept_boxes(feature_map, logits, labels, head_weight, image_size=(96, 96), impl=impl)
    feature_map[1:3] = torch.nan
    boxes, negative_classes = concept_boxes(
        feature_map, logits, labels, head_weight, image_size=(96, 96), impl=impl
    )
    assert torch.equal(boxes, expected[0]) and torch.equal(negative_classes, expected[1])
    assert boxes[1:3].unique(dim=1).tolist() == [[[16.0, 16.0, 80.0, 80.0]]] * 2
    assert negative_classes[1:3].tolist() == [[-1] * 3] * 2


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_special_values_rank_as_torch_sorts_them(impl: Any) -> None:
    logits = torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, 1.0, 0.0]]).repeat(2, 1)
    _, negative_classes = concept_boxes(
        torch.zeros(2, 1, 1, 1),
        logits,
        torch.tensor([4, 2]),
        torch.zeros(6, 1),
        image_size=(8, 8),
        patches=1,
        impl=impl,
    )
    assert negative_classes.tolist() == [[2, 0, 1, 5, 3], [4, 0, 1, 5, 3]]


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(*(st.integers(low, high) for low, high in ((1, 6), (1, 30), (1, 4), (1, 4), (1, 6)))),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_rows_are_searched_on_their_own(
    shape: tuple[int, int, int, int, int], seed: int, data: st.DataObject
) -> None:
    """Permuting the batch permutes the results, and any widths that fit are taken."""
    inputs = draw(shape, torch.Generator().manual_seed(seed))
    order = torch.tensor(data.draw(st.permutations(range(shape[0]))))
    group_width = data.draw(st.integers(1, shape[1]))
    options: dict[str, Any] = {
        "image_size": (32 * shape[2], 32 * shape[3]),
        "patches": 3,
        "group_width": group_width,
        "rank_stride": data.draw(st.integers(0, (shape[1] - group_width) // 2)),
        "impl": "native",
    }
    feature_map, logits, labels, head_weight = inputs
    plain = concept_boxes(*inputs, **options)
    permuted = concept_boxes(feature_map[order], logits[order], labels[order], head_weight, **options)
    assert all(torch.equal(a[order], b) for a, b in zip(plain, permuted, strict=True))
    assert torch.equal(plain[0], concept_boxes(*inputs, **{**options, "impl": "reference"})[0])


def test_default_widths_always_fit() -> None:
    """Nine groups of the scaled widths end within D for every D."""
    for width in range(1, 5000):
        assert 8 * default_rank_stride(width) + default_group_width(width) <= width
    assert (default_group_width(768), default_rank_stride(768)) == (11, 93)
