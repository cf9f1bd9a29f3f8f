"""The Triton launchers of two_head_cross_entropy write all of their results and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from mooring_kernels.two_head_cross_entropy.gpu import two_head_cross_entropy_bwd, two_head_cross_entropy_fwd


# several tiles of rows in either head, partial ones; a second, partial block of columns in one head
@pytest.mark.parametrize("shape", [(19, 37, 3, 4100), (2, 4100, 33, 9), (1, 1, 0, 1)], ids=str)
def test_results_are_whole_and_within_bounds(
    shape: tuple[int, int, int, int],
    device: torch.device,
    generator: torch.Generator,
    guarded_empty: None,
    assert_within: Any,
) -> None:
    heads = []
    for rows, classes in (shape[:2], shape[2:]):
        logits = (3 * torch.randn(rows, classes, generator=generator)).to(device)
        labels = torch.randint(-1, classes + 1, (rows,), generator=generator).to(device)
        labels[-1:] = classes - 1
        heads += [logits, labels]
    rows4 = tuple(heads)
    *losses, inverse_counts, lse = two_head_cross_entropy_fwd(*rows4, None, 0.5, 0.1)
    expected_lse = torch.cat([heads[0].double().logsumexp(1), heads[2].double().logsumexp(1)])
    valid = [(labels >= 0) & (labels < logits.shape[1]) for logits, labels in (heads[:2], heads[2:])]
    assert_within(lse, torch.where(torch.cat(valid), expected_lse, 0), operations=80, magnitude=20)
    assert all(loss.isfinite() for loss in losses)
    counts = torch.stack([v.sum() for v in valid]).clamp_min(1)
    torch.testing.assert_close(inverse_counts, 1.0 / counts, rtol=1e-6, atol=0)
    upstream = (torch.ones((), device=device), None, None)
    options = (lse, upstream, inverse_counts, None, 0.5, 0.1)
    both = two_head_cross_entropy_bwd(*rows4, *options, [True, True])
    for grad, mask in zip(both, valid, strict=True):
        assert grad.isfinite().all() and not grad[~mask].any()
    for wanted, needs in ((0, [True, False]), (1, [False, True])):
        alone = two_head_cross_entropy_bwd(*rows4, *options, needs)
        assert torch.equal(alone[wanted], both[wanted]) and alone[1 - wanted].numel() == 0


@pytest.mark.parametrize("shift", [-1e4, 1e4, 1e30])
def test_a_common_shift_and_forbidden_classes_cost_no_digits(
    shift: float, device: torch.device, generator: torch.Generator, assert_within: Any
) -> None:
    """Losses are relative to the row's maximum; -inf logits take no mass, also as a whole block of columns."""
    shifted = (3 * torch.randn(6, 37, generator=generator)).to(device) + shift
    labels = torch.randint(0, 37, (6,), generator=generator).to(device)
    forbidden = torch.full((1, 8200), float("-inf"), device=device)
    forbidden[0, [8190, 8199]] = 1.0
    rows4 = shifted, labels, forbidden, torch.tensor([8199], device=device)
    for smoothing in (0.0, 0.1):
        target = two_head_cross_entropy_fwd(*rows4, None, 0.5, smoothing)[1]
        expected = torch.nn.functional.cross_entropy(shifted.double(), labels, label_smoothing=smoothing)
        spread = (shifted.max(1, keepdim=True).values - shifted).double().max().item() + 1.0
        assert_within(target, expected, operations=40, magnitude=spread)
    _, _, source, inverse_counts, lse = two_head_cross_entropy_fwd(*rows4, None, 0.5, 0.0)
    torch.testing.assert_close(source.cpu(), torch.tensor(2.0).log(), rtol=1e-6, atol=0.0)
    upstream = (torch.ones((), device=device), None, None)
    options = (lse, upstream, inverse_counts, None, 1.0, 0.0)
    _, grad = two_head_cross_entropy_bwd(*rows4, *options, [False, True])
    torch.testing.assert_close(
        grad[0, [0, 8190, 8199]].cpu(), torch.tensor([0.0, 0.5, -0.5]), rtol=0.0, atol=1e-6
    )
    assert grad.isfinite().all()
