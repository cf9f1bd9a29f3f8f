"""The Triton launchers of text_supervised_loss write all of their results and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from mooring_kernels.text_supervised_loss.gpu import text_supervised_loss_bwd, text_supervised_loss_fwd

OPTIONS = (0.03, 0.2, 0.4)


# one column; several rows per program; a second, partial block of columns
@pytest.mark.parametrize("shape", [(1, 1), (19, 37), (3, 4100)], ids="B{0[0]}-C{0[1]}".format)
def test_results_are_whole_and_within_bounds(
    shape: tuple[int, int],
    device: torch.device,
    generator: torch.Generator,
    guarded_empty: None,
    assert_within: Any,
) -> None:
    batch, classes = shape
    logits = (3 * torch.randn(shape, generator=generator)).to(device)
    cosines = (2 * torch.rand(shape, generator=generator) - 1).to(device)
    labels = torch.randint(-1, classes + 1, (batch,), generator=generator).to(device)
    labels[-1] = classes - 1
    loss, inverse_count, lse_logits, lse_texts = text_supervised_loss_fwd(logits, cosines, labels, *OPTIONS)
    valid = (labels >= 0) & (labels < classes)
    assert_within(inverse_count, 1.0 / valid.sum().double(), operations=1)
    for lse, x in ((lse_logits, logits.double()), (lse_texts, cosines.double() / OPTIONS[0])):
        assert_within(lse, torch.where(valid, x.logsumexp(1), 0), operations=classes**0.5 + 16, magnitude=40)
    one = torch.ones((), device=device)
    saved = (logits, cosines, labels, lse_logits, lse_texts, one, inverse_count)
    both = text_supervised_loss_bwd(*saved, *OPTIONS, [True, True])
    assert all(grad.isfinite().all() and not grad[~valid].any() for grad in both) and loss.isfinite()
    for wanted, needs in ((0, [True, False]), (1, [False, True])):
        alone = text_supervised_loss_bwd(*saved, *OPTIONS, needs)
        assert torch.equal(alone[wanted], both[wanted]) and alone[1 - wanted].numel() == 0


def test_the_mean_walks_more_rows_than_one_block(device: torch.device, generator: torch.Generator) -> None:
    from mooring_kernels.text_supervised_loss.gpu import text_supervised_loss_mean

    rows = torch.randn(1300, generator=generator).to(device)
    labels = torch.randint(-1, 4, (1300,), generator=generator).to(device)
    loss, inverse_count = text_supervised_loss_mean(rows, labels, 3)
    valid = (labels >= 0) & (labels < 3)
    torch.testing.assert_close(loss, rows[valid].mean(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(inverse_count, 1.0 / valid.sum(), rtol=1e-6, atol=0)
