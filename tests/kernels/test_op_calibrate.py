"""calibrate: the closed form against the procedure of the paper, row by row in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS, draw_bank
from torch import Tensor

from mooring_kernels import calibrate, class_statistics


def draw_rotation(width: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0].float()


def procedure(
    frozen: Tensor,
    tuned: Tensor,
    labels: Tensor,
    head_weight: Tensor,
    rotation: Tensor | None,
    scale: float,
    cga: float,
) -> Tensor:
    """Rotate all rows, take both class means of the rotated bank, translate, normalise, scale (eq. 7 to 12)."""
    frozen, tuned, head_weight = frozen.double(), tuned.double(), head_weight.double()
    rotated = frozen if rotation is None else frozen @ rotation.double().T
    result = torch.zeros_like(frozen)
    for c, prototype in enumerate(head_weight):
        members = [k for k, label in enumerate(labels.tolist()) if label == c]
        if not members:
            continue
        weights = torch.softmax(cga * tuned[members] @ (prototype / prototype.norm()), 0)
        shift = weights @ tuned[members] - rotated[members].mean(0)
        for k in members:
            moved = rotated[k] + shift
            result[k] = scale * moved / moved.norm()
    return result


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(0, 4, 3), (1, 1, 1), (13, 17, 9), (60, 130, 2), (40, 65, 25)],
    ids="K{0[0]}-D{0[1]}-C{0[2]}".format,
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_closed_form_equals_the_procedure(
    impl: Any,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    rotated: bool,
    generator: torch.Generator,
    assert_within: Any,
) -> None:
    rows, width, classes = shape
    bank = draw_bank(rows, width, classes, generator, dtype)
    rotation = draw_rotation(width, generator) if rotated else None
    got = calibrate(*bank, rotation, 3.5, 2.0, impl=impl)
    expected = procedure(*bank, rotation, 3.5, 2.0)
    assert got.dtype == torch.float32 and got.shape == expected.shape
    # Entries below one; dots of length `width` twice; then divided by |vhat|, which is not small here but
    # in one dimension, where p - m cancels.
    assert_within(
        got, expected, operations=(rows + 6 * width + 40) * (40 if width == 1 else 4), magnitude=3.5
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_mean_of_a_class_is_its_tuned_mean(impl: Any, generator: torch.Generator) -> None:
    """Before rows are brought to one length: recovered here from directions and the closed form's norms."""
    frozen, tuned, labels, head_weight = draw_bank(30, 12, 3, generator)
    rotation = draw_rotation(12, generator)
    frozen_mean, tuned_mean, _ = class_statistics(frozen, tuned, labels, head_weight)
    directions = calibrate(frozen, tuned, labels, head_weight, rotation, 1.0, impl=impl)
    for c in range(3):
        members = labels == c
        moved = (frozen[members] - frozen_mean[c]) @ rotation.T + tuned_mean[c]
        moved = directions[members] * moved.norm(dim=1, keepdim=True)
        torch.testing.assert_close(moved.mean(0), tuned_mean[c], rtol=0, atol=2e-6)


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_singleton_becomes_its_tuned_row(impl: Any, rotated: bool, generator: torch.Generator) -> None:
    frozen, tuned, _, head_weight = draw_bank(4, 11, 4, generator)
    rotation = draw_rotation(11, generator) if rotated else None
    got = calibrate(frozen, tuned, torch.tensor([3, 1, 0, 2]), head_weight, rotation, 1.0, impl=impl)
    torch.testing.assert_close(got, tuned, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masked_rows_are_zero_and_not_read(impl: Any, generator: torch.Generator) -> None:
    frozen, tuned, _, head_weight = draw_bank(5, 6, 2, generator)
    labels = torch.tensor([0, -1, 1, 2, 0])
    masked = torch.tensor([1, 3])
    expected = calibrate(frozen, tuned, labels, head_weight, torch.eye(6), 2.0, impl="reference")
    frozen[masked], tuned[masked] = torch.nan, torch.inf
    for rotation in (None, torch.eye(6)):
        got = calibrate(frozen, tuned, labels, head_weight, rotation, 2.0, impl=impl)
        assert torch.equal(got[masked], torch.zeros(2, 6))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ablations_without_translation(impl: Any, generator: torch.Generator) -> None:
    frozen, tuned, labels, head_weight = draw_bank(20, 9, 4, generator)
    rotation = draw_rotation(9, generator)
    valid = (labels >= 0) & (labels < 4)
    p, q = frozen[valid].double(), tuned[valid].double()
    moved = p @ rotation.double().T + q.mean(0) - rotation.double() @ p.mean(0)
    expected = torch.zeros(20, 9, dtype=torch.float64)
    expected[valid] = 2 * moved / moved.norm(dim=1, keepdim=True)
    got = calibrate(frozen, tuned, labels, head_weight, rotation, 2.0, translation=False, impl=impl)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)
    nothing = calibrate(frozen, tuned, labels, head_weight, None, 2.0, translation=False, impl=impl)
    torch.testing.assert_close(nothing, torch.where(valid[:, None], 2 * frozen, 0), rtol=0, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scale_as_number_and_as_tensor(impl: Any, generator: torch.Generator) -> None:
    bank = draw_bank(7, 5, 3, generator)
    number = calibrate(*bank, None, 1.25, impl=impl)
    tensor = calibrate(*bank, None, torch.tensor(1.25, requires_grad=True), impl=impl)
    assert torch.equal(number, tensor) and not tensor.requires_grad


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), rows=st.integers(1, 20), rotated=st.booleans())
def test_permuting_the_bank_permutes_the_result(seed: int, rows: int, rotated: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    frozen, tuned, labels, head_weight = draw_bank(rows, 8, 3, generator)
    rotation = draw_rotation(8, generator) if rotated else None
    order = torch.randperm(rows, generator=generator)
    plain = calibrate(frozen, tuned, labels, head_weight, rotation, 1.0)
    permuted = calibrate(frozen[order], tuned[order], labels[order], head_weight, rotation, 1.0)
    torch.testing.assert_close(plain[order], permuted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_autocast_does_not_reach_the_rotation(impl: Any, generator: torch.Generator) -> None:
    bank = draw_bank(12, 16, 3, generator)
    rotation = draw_rotation(16, generator)
    expected = calibrate(*bank, rotation, 1.0, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(calibrate(*bank, rotation, 1.0, impl=impl), expected)


def test_float64_is_computed_in_float64(generator: torch.Generator) -> None:
    frozen, tuned, labels, head_weight = draw_bank(20, 9, 4, generator)
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64))[0]
    bank = frozen.double(), tuned.double(), labels, head_weight.double()
    got = calibrate(*bank, rotation, 1.0, 3.0)
    torch.testing.assert_close(got, procedure(*bank, rotation, 1.0, 3.0), rtol=0, atol=1e-13)
