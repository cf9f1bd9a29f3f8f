"""Triton calibration against its closed form in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from mooring_kernels.calibrate.gpu import calibrate_fwd


def closed_form(
    frozen: Tensor,
    labels: Tensor,
    frozen_mean: Tensor,
    tuned_mean: Tensor,
    rotation: Tensor | None,
    scale: Tensor,
) -> Tensor:
    result = torch.zeros(frozen.shape, dtype=torch.float64, device=frozen.device)
    for k, c in enumerate(labels.tolist()):
        if not 0 <= c < frozen_mean.shape[0]:
            continue
        residual = frozen[k].double() - frozen_mean[c].double()
        moved = (residual if rotation is None else rotation.double() @ residual) + tuned_mean[c].double()
        result[k] = scale.double() * moved / moved.norm().clamp_min(1e-12)
    return result


def draw(
    rows: int,
    width: int,
    classes: int,
    dtype: torch.dtype,
    rotated: bool,
    device: torch.device,
    generator: torch.Generator,
) -> tuple[Any, ...]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    frozen, tuned = (torch.nn.functional.normalize(normal(rows, width)).to(dtype) for _ in range(2))
    labels = torch.randint(-1, classes + 1, (rows,), generator=generator).to(device)
    rotation = torch.linalg.qr(normal(width, width).cpu())[0].to(device) if rotated else None
    frozen_mean, tuned_mean = (normal(classes, width) / width**0.5 for _ in range(2))
    return frozen, tuned, labels, frozen_mean, tuned_mean, rotation, torch.tensor(17.5, device=device)


@pytest.mark.parametrize("rotated", [False, True], ids=["translate", "rotate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (13, 17, 9), (35, 130, 3)], ids="K{0[0]}-D{0[1]}-C{0[2]}".format
)
def test_calibrated_rows(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    rotated: bool,
    device: torch.device,
    generator: torch.Generator,
    guarded_empty: None,
    assert_within: Any,
) -> None:
    frozen, tuned, labels, frozen_mean, tuned_mean, rotation, scale = draw(
        *shape, dtype, rotated, device, generator
    )
    actual = calibrate_fwd(frozen, tuned, labels, frozen_mean, tuned_mean, rotation, scale)
    expected = closed_form(frozen, labels, frozen_mean, tuned_mean, rotation, scale)
    assert actual.dtype == torch.float32
    moved = (frozen.double().norm(dim=1) + 3.0)[:, None]  # the parts that cancel are of this size
    shortest = 0.05  # of the drawn sums, before they are scaled up to 17.5
    assert_within(actual, expected, operations=shape[1] ** 0.5 + 16, magnitude=17.5 * moved / shortest)


def test_masked_rows_are_zero_and_not_read(device: torch.device, generator: torch.Generator) -> None:
    for rotated in (False, True):
        arguments = list(draw(6, 12, 4, torch.float32, rotated, device, generator))
        arguments[2] = torch.tensor([0, -1, 3, 4, 1, -9], device=device)
        clean = calibrate_fwd(*arguments)
        for row in (1, 3, 5):
            arguments[0][row] = float("nan")
        dirty = calibrate_fwd(*arguments)
        assert torch.equal(clean, dirty)
        assert not dirty[[1, 3, 5]].any()


def test_a_singleton_becomes_its_tuned_row(
    device: torch.device, generator: torch.Generator, assert_within: Any
) -> None:
    """n_c = 1: the residual vanishes and the calibrated row is the tuned row, whatever the rotation."""
    frozen, tuned, _, _, _, rotation, scale = draw(3, 20, 3, torch.float32, True, device, generator)
    labels = torch.arange(3, device=device)
    actual = calibrate_fwd(frozen, tuned, labels, frozen.clone(), tuned.clone(), rotation, scale)
    assert_within(actual, 17.5 * tuned.double(), operations=32, magnitude=17.5)


def test_zero_row_stays_zero(device: torch.device) -> None:
    nothing = torch.zeros(2, 8, device=device)
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    actual = calibrate_fwd(
        nothing, nothing, labels, nothing[:1], nothing[:1], None, torch.tensor(3.0, device=device)
    )
    assert torch.equal(actual, nothing)


def test_autocast_does_not_reach_the_rotation(device: torch.device, generator: torch.Generator) -> None:
    arguments = draw(9, 16, 3, torch.float32, True, device, generator)
    plain = calibrate_fwd(*arguments)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(calibrate_fwd(*arguments), plain)


def test_strided_bank_and_no_rows(device: torch.device, generator: torch.Generator) -> None:
    frozen, tuned, *rest = draw(7, 24, 3, torch.float32, False, device, generator)
    labels, frozen_mean, tuned_mean, rotation, scale = rest
    means = frozen_mean[:, ::2], tuned_mean[:, ::2]
    strided = calibrate_fwd(frozen[:, ::2], tuned[:, ::2], labels, *means, rotation, scale)
    dense = calibrate_fwd(frozen[:, ::2].contiguous(), tuned[:, ::2], labels, *means, rotation, scale)
    assert torch.equal(strided, dense)
    assert calibrate_fwd(frozen[:0], tuned[:0], labels[:0], frozen_mean, tuned_mean, None, scale).shape == (
        0,
        24,
    )
