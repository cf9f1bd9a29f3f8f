"""The Triton launcher of queue_info_nce writes all of its results and nothing else, the same every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from implementations import draw_unit_rows

pytest.importorskip("triton")
from mooring_kernels.queue_info_nce import gpu, reference


# a second, partial block of queries; several chunks, the last one short; a partial block of features
@pytest.mark.parametrize("shape", [(19, 70, 37), (2, 550, 70)], ids=str)
@pytest.mark.parametrize("needs", [[True, True], [False, True], [False, False]], ids=str)
def test_results_are_whole_and_within_bounds(
    shape: tuple[int, int, int],
    needs: list[bool],
    device: torch.device,
    generator: torch.Generator,
    guarded_empty: None,
    assert_within: Any,
) -> None:
    batch, slots, width = shape
    query, own = (draw_unit_rows(batch, width, generator).to(device) for _ in range(2))
    queue = draw_unit_rows(slots, width, generator).to(device)
    labels = torch.randint(-1, 3, (batch,), generator=generator).to(device)
    queue_labels = torch.randint(-1, 3, (slots,), generator=generator).to(device)
    rows = (query, own, labels, queue, queue_labels, 0.07)
    losses, positives, grad_query, own_factor = gpu.queue_info_nce_fwd(*rows, needs)
    valid = labels >= 0
    expected = (labels[:, None] == queue_labels).sum(1) + 1
    assert torch.equal(positives, torch.where(valid, expected, 0).float())
    for i in range(batch):
        at = slice(i, i + 1)
        exact = reference.queue_info_nce(query[at].double(), own[at], labels[at], queue, queue_labels, 0.07)
        torch.testing.assert_close(losses[i].double(), exact, rtol=1e-5, atol=1e-5)
    assert grad_query.shape == (shape[::2] if needs[0] else (0,)) and grad_query.isfinite().all()
    assert own_factor.shape == ((batch,) if needs[1] else (0,)) and own_factor.isfinite().all()
    if needs[0]:
        assert not grad_query[~valid].any()
        again = gpu.queue_info_nce_fwd(*rows, needs)
        assert torch.equal(again[0], losses) and torch.equal(again[2], grad_query)


def test_chunks_of_the_queue_do_not_outnumber_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts' memory is bounded, whatever N; every slot belongs to one chunk."""
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: grids.append((*grid, *arguments[7:9]))

    monkeypatch.setattr(gpu, "queue_info_nce_fwd_kernel", Recorder())
    monkeypatch.setattr(gpu, "queue_info_nce_combine_kernel", Recorder())
    for slots in (0, 1, 255, 8000, 40000, 1_000_001):
        labels = torch.zeros(slots, dtype=torch.int64)
        query = torch.zeros(48, 4)
        gpu.queue_info_nce_fwd(query, None, labels[:0], torch.zeros(slots, 4), labels, 0.1, [True, False])
        _, chunks, rows, chunk_rows = grids[-2]
        assert rows == slots and 1 <= chunks <= 64
        assert (chunks - 1) * chunk_rows <= max(slots - 1, 0) < max(chunks * chunk_rows, 1)
