"""class_statistics: every implementation against a loop over classes in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS, draw_bank
from torch import Tensor

from mooring_kernels import class_statistics


def loop(
    frozen: Tensor, tuned: Tensor, labels: Tensor, head_weight: Tensor, cga_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    frozen, tuned, head_weight = frozen.double(), tuned.double(), head_weight.double()
    frozen_mean, tuned_mean = torch.zeros_like(head_weight), torch.zeros_like(head_weight)
    count = head_weight.new_zeros(len(head_weight))
    for c, prototype in enumerate(head_weight):
        members = [k for k, label in enumerate(labels.tolist()) if label == c]
        count[c] = len(members)
        if members:
            unit = prototype / max(prototype.norm().item(), 1e-12)
            weights = torch.softmax(cga_scale * tuned[members] @ unit, 0)
            frozen_mean[c] = sum(frozen[k] for k in members) / len(members)
            tuned_mean[c] = sum(w * tuned[k] for w, k in zip(weights, members, strict=True))
    return frozen_mean, tuned_mean, count


@pytest.mark.parametrize("cga_scale", [0.0, 1.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(0, 4, 3), (1, 1, 1), (13, 17, 9), (60, 130, 2), (40, 65, 25)],
    ids="K{0[0]}-D{0[1]}-C{0[2]}".format,
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_against_a_loop(
    impl: Any,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    cga_scale: float,
    generator: torch.Generator,
    assert_within: Any,
) -> None:
    rows, width, classes = shape
    bank = draw_bank(rows, width, classes, generator, dtype)
    got = class_statistics(*bank, cga_scale, impl=impl)
    expected = loop(*bank, cga_scale)
    assert [t.dtype for t in got] == [torch.float32] * 3
    assert torch.equal(got[2].double(), expected[2])
    # sums of at most `rows` entries of unit rows; exponents up to cga_scale come out of dots of length `width`
    assert_within(got[0], expected[0], operations=rows + 4)
    assert_within(got[1], expected[1], operations=rows + 8 + 4 * cga_scale * (width + 4))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masked_rows_are_not_read_and_absent_classes_are_zero(impl: Any, generator: torch.Generator) -> None:
    frozen, tuned, _, head_weight = draw_bank(6, 7, 4, generator)
    labels = torch.tensor([1, -1, 1, 4, 3, -5])
    masked = (labels < 0) | (labels >= 4)
    frozen[masked], tuned[masked] = torch.nan, torch.nan
    frozen_mean, tuned_mean, count = class_statistics(frozen, tuned, labels, head_weight, impl=impl)
    assert count.tolist() == [0, 2, 0, 1]
    for mean in (frozen_mean, tuned_mean):
        assert torch.equal(mean[[0, 2]], torch.zeros(2, 7)) and mean.isfinite().all()


@pytest.mark.parametrize("cga_scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_single_member_is_returned_exactly(impl: Any, cga_scale: float, generator: torch.Generator) -> None:
    frozen, tuned, _, head_weight = draw_bank(3, 19, 3, generator)
    frozen_mean, tuned_mean, _ = class_statistics(
        frozen, tuned, torch.tensor([2, 0, 1]), head_weight, cga_scale, impl=impl
    )
    assert torch.equal(frozen_mean, frozen[[1, 2, 0]]) and torch.equal(tuned_mean, tuned[[1, 2, 0]])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_exponents_beyond_the_range_of_exp(impl: Any) -> None:
    """The weight of the best member goes to one; nothing overflows."""
    tuned = torch.eye(3)
    _, tuned_mean, _ = class_statistics(
        tuned, tuned, torch.zeros(3, dtype=torch.int64), torch.tensor([[0.0, 2.0, 0.0]]), 1e4, impl=impl
    )
    torch.testing.assert_close(tuned_mean, torch.tensor([[0.0, 1.0, 0.0]]))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), rows=st.integers(1, 20), classes=st.integers(1, 6))
def test_order_and_names_of_classes_do_not_matter(seed: int, rows: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    frozen, tuned, labels, head_weight = draw_bank(rows, 8, classes, generator)
    expected = class_statistics(frozen, tuned, labels, head_weight)
    order = torch.randperm(rows, generator=generator)
    permuted = class_statistics(frozen[order], tuned[order], labels[order], head_weight)
    rename = torch.randperm(classes, generator=generator)  # class c becomes rename[c]
    inside = (labels >= 0) & (labels < classes)
    new_labels = torch.where(inside, rename[labels.clamp(0, classes - 1)], labels)
    renamed_head = torch.empty_like(head_weight)
    renamed_head[rename] = head_weight
    renamed = class_statistics(frozen, tuned, new_labels, renamed_head)
    for plain, other, third in zip(expected, permuted, renamed, strict=True):
        torch.testing.assert_close(plain, other, rtol=0, atol=1e-6)
        assert torch.equal(plain, third[rename])


def test_a_thousand_singletons_match_the_loop(generator: torch.Generator, assert_within: Any) -> None:
    frozen, tuned, _, head_weight = draw_bank(1200, 24, 1000, generator)
    labels = torch.randperm(1200, generator=generator) % 1100  # classes of 0, 1 and 2 rows, and masked rows
    got = class_statistics(frozen, tuned, labels, head_weight)
    expected = loop(frozen, tuned, labels, head_weight, 1.0)
    for mean, exact in zip(got, expected, strict=True):
        assert_within(mean, exact, operations=200)


def test_the_result_does_not_depend_on_the_number_of_threads(generator: torch.Generator) -> None:
    bank = draw_bank(700, 600, 5, generator)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(class_statistics(*bank, impl="native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_no_gradient_passes(generator: torch.Generator) -> None:
    frozen, tuned, labels, head_weight = draw_bank(6, 5, 3, generator)
    for impl in ("reference", "auto"):
        results = class_statistics(
            frozen.requires_grad_(), tuned, labels, head_weight.requires_grad_(), impl=impl
        )  # type: ignore[arg-type]
        assert not any(result.requires_grad for result in results)
