"""Triton patch_match_info_nce against loops over images and key sets in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from patch_match_definition import Problem, definition, draw
from torch import Tensor

pytest.importorskip("triton")
from mooring_kernels.patch_match_info_nce.gpu import patch_match_info_nce_fwd

# B, C, K, P, D, M; likeness of a class's patches; options. D over one block, the own key alone in a program,
# fewer entries than negatives_per_set, the most patches.
CASES: list[tuple[tuple[int, int, int, int, int, int], float, dict[str, float]]] = [
    ((2, 3, 2, 9, 20, 2), 3.0, {}),
    ((2, 2, 2, 3, 5, 1), 0.0, {"rounds": 4}),
    ((1, 2, 1, 16, 24, 1), 1.0, {"rounds": 3, "negatives_per_set": 4, "epsilon": 0.05}),
]


def run(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor]:
    p = problem.to(device)
    entries = min(p.negatives_per_set, p.query.shape[1] ** 2)
    return patch_match_info_nce_fwd(*list(p), entries, p.epsilon, p.rounds, True)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[0])))
def test_forward_and_backward(
    case: Any,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    guarded_empty: None,
    assert_within: Any,
) -> None:
    sizes, likeness, options = case
    problem = draw(sizes, generator, likeness=likeness, dtype=dtype, **options)
    loss, grad = run(problem, device)
    exact = problem.to(torch.float64)
    query = exact.query.clone().requires_grad_()
    valid = (problem.labels >= 0) & (problem.labels < sizes[1])
    expected = definition(replace(exact, query=query)) * valid.sum().clamp_min(1)
    (expected_grad,) = torch.autograd.grad(expected, query)
    operations, largest = 2 * sizes[4] ** 0.5 + 16, 1 / problem.temperature
    assert_within(loss.sum(), expected.detach(), operations=operations, magnitude=4 * largest)
    assert_within(grad, expected_grad, operations=operations, magnitude=largest * (1 + largest))
    assert torch.equal(loss.cpu()[~valid], torch.zeros_like(loss.cpu()[~valid]))


def test_masked_rows_are_zero_and_a_nan_is_not_hidden(
    device: torch.device, generator: torch.Generator
) -> None:
    problem = draw((3, 2, 1, 3, 6, 1), generator, rounds=2, epsilon=0.1)
    problem = replace(problem, labels=torch.tensor([1, -1, 0]))
    problem.query[0, 1, 2] = float("nan")
    loss, grad = run(problem, device)
    assert loss[0].isnan() and grad[0].isnan().any()
    assert loss[1] == 0 and grad[1].count_nonzero() == 0
    assert loss[2].isfinite() and grad[2].isfinite().all()
