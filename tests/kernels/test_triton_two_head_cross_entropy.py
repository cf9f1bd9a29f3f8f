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
