"""queue_info_nce: every implementation against a double loop in float64, and its properties."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS, KERNELS, draw_unit_rows
from torch import Tensor

from mooring_kernels import queue_info_nce
from mooring_kernels.queue_info_nce import op as queue_info_nce_op
from mooring_kernels.queue_info_nce.sums import queue_sums

TEMPERATURE = 0.07
UPSTREAM = -1.7
Rows = tuple[Any, ...]  # query, own_key or None, labels, queue, queue_labels


def definition(rows: Rows, temperature: float) -> Tensor:
    query, own, labels, queue, queue_labels = rows
    total, count = query.sum() * 0, 0
    for i, label in enumerate(labels.tolist()):
        keys = [] if own is None else [(own[i], True)]
        keys += [(k, n == label) for k, n in zip(queue, queue_labels.tolist(), strict=True) if n >= 0]
        if label < 0 or not any(positive for _, positive in keys):
            continue
        logits = torch.stack([query[i] @ key for key, _ in keys]) / temperature
        positive = torch.tensor([p for _, p in keys])
        # KL(uniform over the positives || softmax)
        share = 1 / positive.sum()
        total = total + (share * (share.log() - logits.log_softmax(0)[positive])).sum()
        count += 1
    return total / max(count, 1)


def draw(
    shape: tuple[int, int, int],
    generator: torch.Generator,
    own: bool = True,
    dtype: torch.dtype = torch.float32,
    classes: int = 4,
) -> Rows:
    batch, slots, width = shape
    return (
        draw_unit_rows(batch, width, generator).to(dtype),
        draw_unit_rows(batch, width, generator).to(dtype) if own else None,
        torch.randint(-1, classes, (batch,), generator=generator),
        draw_unit_rows(slots, width, generator).to(dtype),
        torch.randint(-2, classes, (slots,), generator=generator),
    )


def with_gradients(
    rows: Rows, call: Any, needs: tuple[bool, bool] = (True, True), temperature: float = TEMPERATURE
) -> list[Tensor]:
    query = rows[0].detach().clone().requires_grad_(needs[0])
    own = None if rows[1] is None else rows[1].detach().clone().requires_grad_(needs[1])
    loss = call((query, own, *rows[2:]), temperature)
    wanted = [t for t in (query, own) if t is not None and t.requires_grad]
    grads = torch.autograd.grad(UPSTREAM * loss, wanted) if wanted else ()
    return [loss.detach(), *grads]


def by(impl: Any) -> Any:
    return lambda rows, temperature: queue_info_nce(*rows, temperature=temperature, impl=impl)


# 70 and 300: more rows than a tile, and than one chunk; D wider than a block of features; one query, no slot
@pytest.mark.parametrize("own", [True, False], ids=["own", "queue"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(5, 13, 37), (17, 70, 200), (1, 9, 1), (3, 0, 8), (2, 600, 130), (2, 40, 300)], ids=str
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_forward_and_backward(
    impl: Any,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    own: bool,
    generator: torch.Generator,
    assert_within: Any,
) -> None:
    rows = draw(shape, generator, own, dtype)
    rows[2][-1] = 2
    before = [None if t is None else t.clone() for t in rows]
    got = with_gradients(rows, by(impl))
    exact_rows = tuple(t.double() if t is not None and t.is_floating_point() else t for t in rows)
    expected = with_gradients(exact_rows, definition)
    # a logit is a sum of D products of size 1 / T; a gradient divides by T once more
    operations = shape[2] ** 0.5 + 40
    for result, exact, size in zip(got, expected, (1.0, 1.0 / TEMPERATURE, 1.0 / TEMPERATURE), strict=False):
        assert_within(result, exact, operations=operations, magnitude=(1.0 + size) / TEMPERATURE)
    assert got[0].dtype == torch.float32 and got[0].shape == () and got[1].dtype == dtype
    assert all(a is None or torch.equal(a, b) for a, b in zip(before, rows, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_only_the_gradients_that_are_asked_for(impl: Any, generator: torch.Generator) -> None:
    """A fixed query with an own key that learns is Bi-Tuning's L_y."""
    rows = draw((5, 20, 9), generator)
    rows[2][0] = 1
    loss, grad_query, grad_own = with_gradients(rows, by(impl))
    for needs, expected in (((True, False), grad_query), ((False, True), grad_own)):
        alone = with_gradients(rows, by(impl), needs)
        assert torch.equal(alone[0], loss) and torch.equal(alone[1], expected)
    assert torch.equal(with_gradients(rows, by(impl), (False, False))[0], loss)
    # KL's constant: with its own key as the only key, a query has the loss 0
    nothing = torch.zeros(0, dtype=torch.int64)
    alone_rows = (*rows[:2], torch.zeros(5, dtype=torch.int64), rows[3][:0], nothing)
    for result in with_gradients(alone_rows, by(impl)):
        assert result.abs().max() < 1e-6


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masked_queries_and_empty_slots(impl: Any, generator: torch.Generator) -> None:
    rows = draw((4, 12, 6), generator)
    rows[2][:] = torch.tensor([0, -1, 2, -7])
    expected = with_gradients(rows, by(impl))
    filled = rows[4] >= 0
    fewer = (rows[0][[0, 2]], rows[1][[0, 2]], rows[2][[0, 2]], rows[3][filled], rows[4][filled])
    got = with_gradients(fewer, by(impl))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=1e-6)
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b[[0, 2]], rtol=1e-5, atol=1e-5)
        assert not b[[1, 3]].any()
    # what is masked is not read
    for place, masked in ((0, rows[2] < 0), (1, rows[2] < 0), (3, ~filled)):
        rows[place][masked] = torch.nan
    poisoned = with_gradients(rows, by(impl))
    assert all(torch.equal(a, b) for a, b in zip(poisoned, expected, strict=True))
    rows[3][filled.nonzero()[0]] = torch.nan
    assert with_gradients(rows, by(impl))[0].isnan()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_valid_gives_zero_with_zero_gradients(impl: Any, generator: torch.Generator) -> None:
    masked, alone, empty = (draw((3, 7, 5), generator, own) for own in (True, False, False))
    masked[2][:] = -1
    alone[2][:] = 9  # no slot of this class, no own key
    empty[4][:] = -1
    for rows in (masked, alone, empty):
        assert not any(result.any() for result in with_gradients(rows, by(impl)))
    none = draw((0, 7, 5), generator)
    assert all(not r.any() and r.isfinite().all() for r in with_gradients(none, by(impl)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_extreme_logits(impl: Any, generator: torch.Generator) -> None:
    """Logits of 1e4: the running maximum moves in both directions, and nothing overflows."""
    rows = draw((3, 200, 8), generator)
    rows[2][:] = torch.tensor([0, 1, 2])
    order = (rows[3] @ rows[0][0]).argsort()
    for turn in (order, order.flip(0)):
        turned: Rows = (*rows[:3], rows[3][turn], rows[4][turn])
        exact: Rows = (turned[0].double(), turned[1].double(), turned[2], turned[3].double(), turned[4])
        got, expected = (
            with_gradients(r, by(i), temperature=1e-4) for r, i in ((turned, impl), (exact, "reference"))
        )
        # a logit of 1e4 is off by some 2^-20 of it, the exponential by as much
        for a, b, size in zip(got, expected, (1.0, 1e4, 1e4), strict=True):
            torch.testing.assert_close(a.double() / size, b / size, rtol=1e-4, atol=0.03)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides_and_autocast(impl: Any, generator: torch.Generator) -> None:
    query, own, labels, queue, queue_labels = draw((5, 20, 9), generator)
    assert own is not None
    expected = queue_info_nce(query, own, labels, queue, queue_labels, TEMPERATURE, impl=impl)
    pair, two_labels = torch.stack([query, own], 2), torch.stack([labels, labels], 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        strided = queue_info_nce(
            *(pair[:, :, 0], pair[:, :, 1], two_labels[:, 1]),
            *(queue.T.contiguous().T, queue_labels.repeat_interleave(2)[::2]),
            TEMPERATURE,
            impl=impl,
        )
    torch.testing.assert_close(strided, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", KERNELS)
@settings(max_examples=6, deadline=None)
@given(shape=st.tuples(*(st.integers(1, n) for n in (6, 90, 20))), seed=st.integers(0, 99))
def test_order_and_names_are_free(impl: Any, shape: tuple[int, int, int], seed: int) -> None:
    """Order of queries, of slots, and names of classes; empty slots anywhere change nothing."""
    generator = torch.Generator().manual_seed(seed)
    rows = draw(shape, generator)
    queries, slots = (torch.randperm(n, generator=generator) for n in shape[:2])
    names = torch.cat([torch.randint(2**40, 2**60, (4,), generator=generator), torch.tensor([-3, -1])])
    moved = (rows[0][queries], rows[1][queries], names[rows[2]][queries])
    gap = torch.zeros(70, shape[2])
    longer = (torch.cat([rows[3][slots], gap]), torch.cat([names[rows[4]][slots], torch.full((70,), -1)]))
    before, after = with_gradients(rows, by(impl)), with_gradients((*moved, *longer), by(impl))
    torch.testing.assert_close(before[0], after[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(before[1:], after[1:], strict=True):
        torch.testing.assert_close(a[queries], b, rtol=1e-4, atol=1e-4)


def test_threads_change_nothing_and_one_query_takes_the_reference(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = draw((50, 3000, 33), generator)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(rows, by("native")))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    monkeypatch.setattr(queue_info_nce_op, "_forward", None)
    queue_info_nce(*(t[:1] for t in rows[:3]), *rows[3:], temperature=TEMPERATURE)


def test_memory_does_not_grow_with_the_queue(generator: torch.Generator) -> None:
    from bench.memory import peak_bytes

    peaks = []
    for slots in (8000, 16000):
        rows = draw((48, slots, 64), generator, dtype=torch.bfloat16)
        peaks.append(peak_bytes(lambda rows=rows: with_gradients(rows, by("native")), torch.device("cpu"))[0])
    assert peaks[0] == peaks[1] < 48 * 8000 * 4


@pytest.mark.parametrize("cuts", [[0, 70], [0, 31, 31, 70]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_over_the_parts_of_a_queue_make_the_loss(
    cuts: list[int], dtype: torch.dtype, generator: torch.Generator, assert_within: Any
) -> None:
    query, _, labels, queue, queue_labels = draw((9, 70, 37), generator, own=False)
    queue, labels = queue.to(dtype), labels.clamp_min(0)
    queue_labels[:8] = torch.arange(8) % 4  # a positive for each

    def from_parts(rows: Rows, temperature: float) -> Tensor:
        found = [
            queue_sums(rows[0], labels, queue[a:b], queue_labels[a:b], temperature)
            for a, b in itertools.pairwise(cuts)
        ]
        log_sums, positive_sums, positives = (torch.stack(each) for each in zip(*found, strict=True))
        if 31 in cuts:
            assert (log_sums[1] == -torch.inf).all() and (positives[1] == 0).all()  # of no slot
        count = positives.sum(0)
        return (log_sums.logsumexp(0) - positive_sums.sum(0) / count - count.log()).mean()

    rows = (query, None, labels, queue, queue_labels)
    found = with_gradients(rows, from_parts)
    exact = (query.double(), None, labels, queue.double(), queue_labels)
    expected = with_gradients(exact, definition)
    for value, wanted in zip(found, expected, strict=True):
        assert_within(value, wanted, operations=2 * 37**0.5 + 16, magnitude=2 / TEMPERATURE)
